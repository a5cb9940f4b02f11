"""What routers read where the attention's sync is dropped: fitted, measured, planned, recovered, checked."""

import os
from pathlib import Path

import pytest
import tiny
import torch
from plans import write_plan
from safetensors.torch import save_file

from spd_calib.errors import InputError
from spd_calib.formats.drops import Drop, Drops, Point, Strategy
from spd_calib.formats.files import dumps, read, sha256_of
from spd_calib.formats.plan import CompensationFile, Plan, RouterPredictor
from spd_calib.formats.profile import Profile
from spd_calib.models.plan_files import load_plan, predictor_tensors
from spd_calib.models.predictor import Predictor
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.parallel.routing import tokens_routed_alike
from spd_calib.recovery.expert_grouping import group_expert_neurons
from spd_calib.recovery.feed import Feed
from spd_calib.recovery.neuron_grouping import distortion
from spd_calib.recovery.planned_model import PlannedModel
from spd_calib.recovery.predictor_fit import PredictorForm
from spd_calib.recovery.router_fit import fit_router
from spd_calib.sensitivity.measure import Subject, measure

HIDDEN = tiny.SHAPE["hidden_size"]
SEQUENCES = [tiny.tokens(1, 24, seed=seed)[0].tolist() for seed in range(32)]
ATTENTIONS = Drops.of_blocks(["block_drop"] * 4)


def chosen_in(lm: TensorParallelLM, drops: Drops, ids: torch.Tensor) -> list[list[set[int]]]:
    """For each mixture, what its router chooses for each token of one sequence."""
    seen: list[list[set[int]]] = []
    hooks = [
        block.experts.router.register_forward_hook(
            lambda m, args, given: seen.append([set(t) for t in given[2].tolist()])
        )
        for block in lm.blocks
        if block.experts
    ]
    with lm.running(drops):
        lm(ids)
    for hook in hooks:
        hook.remove()
    return seen


def test_a_token_is_routed_alike_by_the_share_of_mixtures_that_choose_the_same_set():
    """Two sequences of three tokens, two mixtures; the second ran only in the dense model."""
    dense = {1: torch.tensor([[0, 1], [2, 3], [4, 5], [0, 2], [1, 3], [5, 4]]), 3: torch.zeros(6, 2)}
    planned = {1: torch.tensor([[1, 0], [2, 4], [5, 4], [0, 2], [0, 3], [3, 4]])}
    every = torch.ones(2, 3, dtype=torch.bool)
    assert tokens_routed_alike(dense, planned, every) == [1 + 0.5 + 1, 1 + 0.5 + 0.5]
    assert tokens_routed_alike(dense, planned, torch.tensor([[True, True, False], [False, False, True]])) == [1.5, 0.5]
    assert tokens_routed_alike({1: dense[1]}, planned, every) == [2, 1]
    assert tokens_routed_alike({}, {}, every) == []


@pytest.mark.parametrize("streamed", [False, True])
def test_the_share_routed_as_dense_is_that_of_the_predicted_tokens(streamed: bool) -> None:
    lm = TensorParallelLM.simulated(tiny.build("qwen2_moe"), 4)
    lm.streamed = streamed  # its plans then go through the blocks in lockstep
    late = Drops.of_blocks(["keep_sync"] * 3 + ["block_drop"])
    sequences = [SEQUENCES[0], SEQUENCES[1][:9]]
    _, found = measure(Subject(lm), sequences, plans=[ATTENTIONS, late])
    for drops, comparison in zip((ATTENTIONS, late), found, strict=True):
        alike = total = 0
        for sequence in sequences:
            ids = torch.tensor([sequence])
            for dense, planned in zip(chosen_in(lm, Drops(), ids), chosen_in(lm, drops, ids), strict=True):
                alike += sum(a == b for a, b in zip(dense[:-1], planned[:-1], strict=True))
                total += len(dense) - 1
        assert comparison.routed_as_dense == pytest.approx(alike / total)
    assert 0.05 < found[0].routed_as_dense < found[1].routed_as_dense < 1
    _, (plain,) = measure(Subject(TensorParallelLM.simulated(tiny.build("llama"), 4)), sequences, plans=[ATTENTIONS])
    assert plain.routed_as_dense is None and "routed_as_dense" not in plain.model_dump()


def test_predictors_of_a_router_are_fitted_to_what_it_lacks() -> None:
    model = PlannedModel(tiny.build("mixtral"), 4, ATTENTIONS)
    feed = Feed(model, SEQUENCES, batch_size=4)
    forms = [PredictorForm("mean"), PredictorForm("low_rank", 6), PredictorForm("full")]
    zero, mean, low, full = fit_router(model.students[0], feed, forms=forms)
    lacking = []
    block = model.lm.blocks[0]
    for batch in feed.fitting:  # entering block 0 the streams are the dense model's: what lacks is the attention
        partials, _ = block.attend(feed.inputs(batch), **feed.kwargs(batch))
        lacking.append(torch.stack(partials).sum(0)[batch.mask])
    expected = torch.cat(lacking).mean(0)
    assert torch.allclose(mean.predictor.bias, expected, atol=1e-5)
    assert zero.predictor is None
    assert abs(low.routed_as_dense - full.routed_as_dense) < 0.1  # of as high a rank as there are experts
    assert (low.weights, full.weights) == (2 * 6 * HIDDEN, HIDDEN**2)
    assert zero.routed_as_dense < full.routed_as_dense


@pytest.mark.parametrize(("family", "text"), [("mixtral", "choosing"), ("gpt_oss", "fitting")])
def test_neurons_are_placed_within_their_expert(family: str, text: str) -> None:
    """Gate and up lie below one another, or in turn; of the second, what is gained is lost again on other text."""
    model = PlannedModel(tiny.build(family), 4, ATTENTIONS)
    feed, student = Feed(model, SEQUENCES, batch_size=4), model.students[0].copy()
    before = distortion(student, feed, getattr(feed, text))
    weights = {n: p.clone() for n, p in student.parts.experts.experts.named_parameters()}
    kept, batch = Drops(), feed.choosing[0]
    dense = student.block.run(feed.inputs(batch), kept, **feed.kwargs(batch)).shared
    group_expert_neurons(student, feed, feed.fitting)
    assert not torch.equal(student.parts.experts.experts.down_proj, weights["down_proj"])
    assert (student.block.run(feed.inputs(batch), kept, **feed.kwargs(batch)).shared - dense).abs().max() < 1e-5
    assert distortion(student, feed, getattr(feed, text)) < before


def test_a_mixture_from_its_profile_to_a_recovered_plan(tmp_path: Path, spd, text) -> None:
    folder = tiny.save(tiny.build("qwen3_moe"), tmp_path / "m")
    given = ("--data", text, "--seq-len", 24, "--device", "cpu", "--verify-samples", 6)
    run = spd("profile", folder, "--tp", 2, *given, "--max-samples", 6, "--sync-points", "attention,mlp",
              "--strategy", "block_drop", "-o", tmp_path / "profile.json")  # fmt: skip
    assert run.code == 0, run.err
    assert "routed as dense" in run.err
    profile = read(Profile, tmp_path / "profile.json")
    assert all(0 < m.routed_as_dense <= 1 for m in profile.measurements)
    assert (
        spd("plan", tmp_path / "profile.json", "--drop", 7, "-o", tmp_path / "plan.json", "--device", "cpu").code == 0
    )
    plan = read(Plan, tmp_path / "plan.json")
    assert plan.requires == ["mlp_drop", "router_predictor"]
    assert [b.router for b in plan.blocks] == [RouterPredictor(kind="zero", rank=0)] * 4
    run = spd("recover", tmp_path / "plan.json", *given, "--max-samples", 24, "--methods", "compensation,distillation",
              "--steps", 5, "--final-steps", 10, "--tau1", 0, "--tau2", 0, "-o", tmp_path / "out")  # fmt: skip
    assert run.code == 0, run.err
    recovered, drops = load_plan(tmp_path / "out" / "plan.json")
    assert recovered.verified.routed_as_dense is not None
    for block in recovered.blocks:
        router = drops.at(Point(block.index, "attention")).router
        assert block.router is not None and (router is None) == (block.router.kind == "zero")


def test_a_router_goes_through_the_plans_file(tmp_path: Path) -> None:
    folder = tiny.save(tiny.build("mixtral"), tmp_path / "m")
    router = Predictor(torch.rand(HIDDEN), a=torch.rand(HIDDEN, 3), b=torch.rand(3, HIDDEN))
    tensors = predictor_tensors(Drops({Point(1, "attention"): Drop(Strategy.BLOCK_DROP, router=router)}))
    assert set(tensors) == {f"blocks.1.router.{part}" for part in ("bias", "a", "b")}
    beside = tmp_path / "routers.safetensors"
    save_file(tensors, beside)
    plan = read(Plan, write_plan(tmp_path / "plan.json", folder, 2, ["keep_sync", "block_drop"] + ["keep_sync"] * 2))
    form = RouterPredictor(kind="low_rank", rank=3)
    changes = {
        "compensation": CompensationFile(
            file="routers.safetensors", sha256=sha256_of(tmp_path / "routers.safetensors")
        ),
        "requires": ["router_predictor"],
        "blocks": [b.model_copy(update={"router": form if b.index == 1 else None}) for b in plan.blocks],
    }
    (tmp_path / "plan.json").write_text(dumps(plan.model_copy(update=changes)))
    found = load_plan(tmp_path / "plan.json", ranks=[0])[1].at(Point(1, "attention"))
    assert found.predictors is None and torch.equal(found.router.a, router.a)
    for wrong in ({"requires": []}, {"compensation": None}):
        (tmp_path / "wrong.json").write_text(dumps(plan.model_copy(update=changes | wrong)))
        with pytest.raises(InputError):
            load_plan(tmp_path / "wrong.json")


@pytest.mark.parametrize("worker", [None, "route_apart"])
def test_check_catches_ranks_that_route_apart(tmp_path: Path, monkeypatch, worker) -> None:
    from test_distributed import WORKERS, checked

    from spd_calib.runtimes.torchrun.check import WORKER

    monkeypatch.setenv("PYTHONPATH", f"{WORKERS}:{os.environ.get('PYTHONPATH', '')}")
    folder = tiny.save(tiny.build("mixtral"), tmp_path / "m")
    plan = write_plan(tmp_path / "plan.json", folder, 2, ["keep_sync", "block_drop", "keep_sync", "block_drop"])
    rows = checked(plan, folder, tiny.stories(1, shortest=6, longest=9), worker=worker or WORKER)
    wrong = {row.what: row.found for row in rows if not row.ok}
    if worker is None:
        assert not wrong and any(row.what == "plan: experts the ranks chose" for row in rows)
    else:
        assert wrong["plan: experts the ranks chose"] == "differ from block 1 on"
        assert "plan: prompt tokens" in wrong


def test_a_router_belongs_to_a_dropped_attention() -> None:
    router = Predictor(torch.zeros(HIDDEN))
    with pytest.raises(ValueError, match="go with block_drop"):
        Drop(Strategy.KEEP_SYNC, router=router)
    with pytest.raises(ValueError, match="an MLP's"):
        Drops({Point(0, "mlp"): Drop(Strategy.BLOCK_DROP, router=router)})
