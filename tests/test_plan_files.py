"""A plan and the predictors in the file beside it: from disk to the drops that a model runs."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from plans import RANK, write_plan
from safetensors.torch import load_file, save_file

from spd_calib import check
from spd_calib.errors import InputError
from spd_calib.formats.drops import Drops, Point, Strategy
from spd_calib.formats.files import dumps, read, sha256_of
from spd_calib.formats.plan import Compensation, Plan
from spd_calib.models.plan_files import form_of, load_drops, load_plan, predictor_tensors
from spd_calib.parallel.model import TensorParallelLM

DROP = Strategy.BLOCK_DROP


def predictors_of(drops: Drops) -> dict[int, dict]:
    """The predictors of every block that has any, by rank."""
    return {p.block: dict(found) for p in drops if (found := drops.at(p).predictors) is not None}


@pytest.fixture
def planned(llama, tmp_path) -> Path:
    return write_plan(tmp_path / "plan.json", llama, 2, ["block_drop"] * 4, kinds=["mean", "low_rank", None, "full"])


def test_predictors_come_back_from_the_file_beside_the_plan(planned):
    plan, drops = load_plan(planned)
    raw = load_file(planned.with_name("compensation.safetensors"))
    assert plan == read(Plan, planned)
    assert {p: drops.strategy(p) for p in drops} == {Point(i, "attention"): DROP for i in range(4)}
    found = predictors_of(drops)
    assert {b: sorted(ranks) for b, ranks in found.items()} == {0: [0, 1], 1: [0, 1], 3: [0, 1]}
    assert [found[b][0].kind for b in found] == ["mean", "low_rank", "full"] and found[1][1].rank == RANK
    written = predictor_tensors(drops)
    assert written.keys() == raw.keys() and all(torch.equal(written[k], raw[k]) for k in raw)
    assert all(t.dtype == torch.float32 and t.is_contiguous() for t in written.values())
    one = predictors_of(load_plan(planned, ranks=[1])[1])
    assert {b: list(ranks) for b, ranks in one.items()} == {0: [1], 1: [1], 3: [1]}
    assert torch.equal(one[3][1].w, raw["blocks.3.ranks.1.w"])
    assert load_drops(plan.model_copy(update={"compensation": None}), planned) == plan.drops


def test_predictors_of_routers_and_of_mlps_come_back_too(llama, tmp_path):
    """A router's is read whatever ranks are wanted; each sync point's form is told by its predictors alone."""
    mlp = ["block_drop", "keep_sync", "keep_sync", "keep_sync"]
    path = write_plan(tmp_path / "plan.json", llama, 2, ["block_drop"] * 4, mlp,
                      kinds=["scaled mean", "low_rank", None, None], routers=[None, "full", "low_rank", "zero"],
                      mlp_kinds=["mean", None, None, None])  # fmt: skip
    raw = load_file(path.with_name("compensation.safetensors"))
    _, drops = load_plan(path)
    written = predictor_tensors(drops)
    assert written.keys() == raw.keys() and all(torch.equal(written[k], raw[k]) for k in raw)
    assert {"blocks.0.mlp.ranks.1.bias", "blocks.0.ranks.0.scale", "blocks.1.router.w", "blocks.2.router.a"} <= set(raw)
    forms = {("attention", 0): Compensation(kind="mean", rank=0, scaled=True),
             ("attention", 1): Compensation(kind="low_rank", rank=RANK),
             ("mlp", 0): Compensation(kind="mean", rank=0)}  # fmt: skip
    for block in range(4):
        for sublayer in ("attention", "mlp"):
            assert form_of(drops, Point(block, sublayer)) == forms.get((sublayer, block))
    _, of_one = load_plan(path, ranks=[1])
    assert torch.equal(of_one.at(Point(1, "attention")).router.w, raw["blocks.1.router.w"])
    assert [of_one.at(Point(block, "attention")).router is None for block in range(4)] == [True, False, False, True]
    assert list(of_one.at(Point(0, "mlp")).predictors) == [1] and of_one.at(Point(2, "attention")).predictors is None


def test_a_plan_without_predictors_is_its_strategies(llama, tmp_path):
    attention = ["plain_drop", "keep_sync", "block_drop", "keep_sync"]
    mlp = ["keep_sync", "block_drop", "keep_sync", "keep_sync"]
    plan, drops = load_plan(write_plan(tmp_path / "plan.json", llama, 2, attention, mlp))
    assert drops == plan.drops == Drops.of_blocks(attention, mlp)


def test_the_predictors_that_are_loaded_are_run(planned):
    """At TP 2, of one block: what leaves it is that of the ranks' own MLPs, reading what the file's tensors give."""
    plan, drops = load_plan(planned)
    lm, ids = TensorParallelLM.simulated(tiny.build("llama"), 2), tiny.tokens(2, 6)
    block, own = lm.blocks[0], drops.only([Point(0, "attention")])
    with lm.running(own):
        recording = lm.record(ids)
    entered = recording.streams[0]
    partials, _ = block.attend(entered, **recording.kwargs[0])
    tensors = load_file(planned.with_name(plan.compensation.file))
    expected = entered.shared + sum(partials)
    for rank, (mlp, partial) in enumerate(zip(block.mlps, partials, strict=True)):
        expected = expected + mlp(block.norm2(entered.shared + partial + tensors[f"blocks.0.ranks.{rank}.bias"]))
    assert torch.allclose(recording.streams[1].shared, expected, atol=1e-5)
    with lm.running(drops), torch.no_grad():
        assert not torch.allclose(lm(ids), lm.logits(lm.resume(recording, plan.drops)), atol=1e-3)


def write_changed(planned: Path, change) -> Path:
    """Write the plan after `change` of its tensors, as whoever writes both files by hand would; return the tensors'."""
    file = planned.with_name("compensation.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    plan = read(Plan, planned)
    beside = plan.compensation.model_copy(update={"sha256": sha256_of(file)})
    plan = plan.model_copy(update={"compensation": beside})
    planned.write_text(dumps(plan))
    return file


def changed(planned: Path, change) -> tuple[Plan, str]:
    """The plan after `change` of its tensors, and the refusal of them."""
    file = write_changed(planned, change)
    plan = read(Plan, planned)
    with pytest.raises(InputError) as e:
        load_plan(planned)
    return plan, str(e.value).removeprefix(str(file))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("blocks.1.ranks.0.a"), ": blocks.1.ranks.0.a is missing or not what it should be."),
        (lambda t: t.pop("blocks.0.ranks.1.bias"), ": blocks.0.ranks.1.bias is missing or not what it should be."),
        (lambda t: t["blocks.3.ranks.1.w"].fill_(torch.nan), ": blocks.3.ranks.1.w is missing or not what it should"),
        (lambda t: t.update({"blocks.1.ranks.1.b": torch.zeros(RANK + 1, 64)}), ": blocks.1.ranks.1.b is missing or"),
        (lambda t: t.update({"blocks.0.ranks.0.bias": torch.zeros(2, 64)}), ": blocks.0.ranks.0.bias is missing or"),
        (
            lambda t: t.update({"blocks.0.ranks.0.bias": torch.zeros(64, dtype=torch.int32)}),
            ": blocks.0.ranks.0.bias is",
        ),
        (lambda t: t.update({"blocks.2.ranks.0.bias": torch.zeros(64), "z": torch.zeros(1)}), " holds blocks.2.ranks."),
    ],
)
def test_tensors_that_are_not_the_plans_are_refused(change, words, planned):
    _, refusal = changed(planned, change)
    assert refusal.startswith(words)
    if "holds" in words:
        assert refusal == f" holds blocks.2.ranks.0.bias, which {planned} does not name."
        with pytest.raises(InputError, match=r"blocks\.2\.ranks\.0\.bias"):
            load_plan(planned, ranks=[0])


def test_the_file_beside_the_plan_is_the_one_it_was_written_with(planned, tmp_path):
    plan, file = read(Plan, planned), planned.with_name("compensation.safetensors")
    content = file.read_bytes()

    def refused() -> str:
        with pytest.raises(InputError) as e:
            load_drops(plan, planned)
        return str(e.value)

    file.unlink()
    assert refused() == f"{planned} needs {file.name} beside it, and it is not there; copy both files together."
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / file.name).write_bytes(content)
    file.symlink_to(elsewhere / file.name)
    assert refused() == f"{file} is a link that leaves the folder of {planned}; copy the file itself there."
    file.unlink()
    file.write_bytes(content + b"x")
    assert refused() == f"{file} is not the file {planned} was written with; run `spd-calib recover` again."
    file.write_bytes(b"no tensors")
    with pytest.raises(InputError) as e:
        load_drops(plan, None)
    assert str(e.value) == (
        "The predictors of this plan lie in a file beside it; give the path of the plan's file "
        "(`plan_with_details(...).write` writes both)."
    )
    plan = plan.model_copy(update={"compensation": plan.compensation.model_copy(update={"sha256": sha256_of(file)})})
    assert refused() == f"{file} is not a whole safetensors file; run `spd-calib recover` again."


@pytest.mark.parametrize("of", ["blocks.0", "blocks.1"])
def test_predictors_that_fit_no_rank_of_the_model_are_no_valid_plan(of, planned, llama):
    """All of a block's, one number shorter: they fit one another, and not the model's width."""

    def shorter(tensors):
        for name, tensor in list(tensors.items()):
            if name.startswith(of) and not name.endswith(".a"):
                tensors[name] = tensor[..., :-1].contiguous()

    write_changed(planned, shorter)
    load_plan(planned)
    with pytest.raises(InputError, match=f"compensation of {of.replace('blocks.', 'block ')}, rank 0, does not fit"):
        check(planned)


def test_blocks_that_are_elsewhere_in_the_model_are_no_valid_plan(planned):
    """A runtime finds the blocks by these paths."""
    document = json.loads(planned.read_text())
    document["blocks"][1]["module"] = "model.layers.2"
    planned.write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"says that block 1 is model.layers.2, but it is model.layers.1; plan anew"):
        check(planned)
