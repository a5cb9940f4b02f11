"""The parts of parallel/ one by one: streams by hand, sums of two processes, predictors, what a session refuses."""

import os
import traceback
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
from plans import RANK, write_plan
from safetensors.torch import load_file, save_file

from spd_calib.errors import InputError, SpdError
from spd_calib.formats.common import ModelRef, Strategy
from spd_calib.formats.files import read, sha256_of
from spd_calib.formats.plan import Plan
from spd_calib.parallel.comm import GATHERED_AT_MOST, Distributed, Simulated
from spd_calib.parallel.compensation import Compensation, check_shapes, load_compensation, tensor_name, tensors_of
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.parallel.session import check_same_model, versions
from spd_calib.parallel.small_copy import _narrow
from spd_calib.parallel.streams import Streams, defer, keep, write_off

KEEP, DROP, PLAIN = Strategy.KEEP_SYNC, Strategy.BLOCK_DROP, Strategy.PLAIN_DROP


def in_two_processes(port_file: Path, work) -> None:
    """Run `work(rank)` as rank 0 of a gloo group in this process, and as rank 1 in a fork of it."""
    child = os.fork()
    rank, code = (0, 0) if child else (1, 1)
    try:
        dist.init_process_group("gloo", store=dist.FileStore(str(port_file), 2), rank=rank, world_size=2)
        work(rank)
        code = 0
    except BaseException:
        if child:
            raise
        traceback.print_exc()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        if not child:
            os._exit(code)
        ended = os.waitpid(child, 0)[1]
    assert os.waitstatus_to_exitcode(ended) == 0


@pytest.mark.parametrize("size", [5, GATHERED_AT_MOST // 4, GATHERED_AT_MOST // 4 + 1])
def test_two_processes_have_the_same_sum(size, tmp_path, monkeypatch):
    """Small messages are gathered and summed, larger ones all-reduced: never the other way round."""
    parts = [torch.randn(size, 2, generator=torch.Generator().manual_seed(r)).T[:1] for r in (0, 1)]

    def work(rank: int) -> None:
        comm = Distributed()
        assert (comm.size, comm.rank, list(comm.ranks), comm.all_reduces) == (2, rank, [rank], 0)
        used = []
        for name in ("all_reduce", "all_gather"):
            do = getattr(dist, name)
            monkeypatch.setattr(dist, name, lambda *a, do=do, name=name: used.append(name) or do(*a))
        own = parts[rank].clone()
        total = comm.all_reduce([own])
        assert torch.equal(total, parts[0] + parts[1]) and torch.equal(own, parts[rank])
        assert comm.all_reduces == 1 and used == ["all_gather" if own.nbytes <= 2**15 else "all_reduce"]
        assert torch.equal(comm.all_gather([own]), torch.cat(parts, dim=-1)) and comm.all_reduces == 1
        assert torch.equal(comm.all_gather([own[None]]), torch.cat(parts, dim=-1)[None])

    in_two_processes(tmp_path / "store", work)


def test_a_lost_rank_is_named(tmp_path):
    def work(rank: int) -> None:
        comm = Distributed()
        if rank == 1:
            return
        with pytest.raises(SpdError, match=r"^Rank 0 has lost another rank, which ended without a word"):
            comm.all_reduce([torch.ones(4)])

    in_two_processes(tmp_path / "store", work)


def test_other_errors_keep_their_words(tmp_path):
    def work(rank: int) -> None:
        comm = Distributed()
        with pytest.raises(RuntimeError, match="of my own"), comm._reaching_all():
            raise RuntimeError("of my own")
        with pytest.raises(SpdError, match=f"Rank {rank} has lost"), comm._reaching_all():
            raise RuntimeError("Connection closed by peer")
        dist.barrier()

    in_two_processes(tmp_path / "store", work)


@pytest.mark.parametrize("owed", [False, True])
def test_each_kind_of_sync_point_by_hand(owed):
    """Two ranks, one number each: x = 10, partial sums 1 and 2, bias 100; they may owe 3 and 4, and have kept 5, 6."""

    def t(*values):
        return [torch.tensor([[[float(v)]]]) for v in values]

    def numbers(s: Streams):
        held = [None if part is None else [p.item() for p in part] for part in (s.debt, s.written_off)]
        return s.shared.item(), *held, [s.read(i).item() for i in (0, 1)]

    (x,), partials, (bias,) = t(10), t(1, 2), t(100)
    s = Streams(x, t(3, 4), t(5, 6)) if owed else Streams(x)
    assert s.agree != owed and [s.read(i).item() for i in (0, 1)] == ([18, 20] if owed else [10, 10])
    comm = Simulated(2)
    if owed:
        assert numbers(keep(s, partials, bias, comm)) == (120, None, [5, 6], [125, 126])
        assert numbers(defer(s, partials, bias)) == (110, [4, 6], [5, 6], [119, 122])
        assert numbers(write_off(s, partials, bias)) == (110, [3, 4], [6, 8], [119, 122])
        for act in (defer, write_off):
            with pytest.raises(ValueError, match="zip"):
                act(s, partials[:1], bias)
    else:
        assert numbers(keep(s, partials, None, comm)) == (13, None, None, [13, 13])
        assert numbers(defer(s, iter(partials), bias)) == (110, [1, 2], None, [111, 112])
        assert numbers(write_off(s, iter(partials), None)) == (10, None, [1, 2], [11, 12])
    assert comm.all_reduces == 1 and not Streams(x, None, t(1, 1)).agree and not Streams(x, t(1, 1)).agree


def test_simulated_ranks_sum_in_their_order():
    comm = Simulated(3)
    parts = [torch.tensor([1e8]), torch.tensor([1.0]), torch.tensor([-1e8])]
    assert comm.all_reduce(iter(parts)).item() == 0.0 and comm.all_reduces == 1  # (1e8 + 1) - 1e8 in float32
    assert comm.all_reduce(iter(parts)).item() == 0.0 and comm.all_reduces == 2
    assert [p.item() for p in parts] == [1e8, 1.0, -1e8]  # as they were
    assert torch.equal(comm.all_gather([torch.ones(2, 1), torch.zeros(2, 2)]), torch.tensor([[1.0, 0, 0]] * 2))
    assert list(comm.ranks) == [0, 1, 2] and comm.size == 3


def predictor(kind: str, d_rank: int, d: int, seed: int) -> Compensation:
    draw = torch.Generator().manual_seed(seed)
    bias = 0.3 * torch.randn(d, generator=draw)
    if kind == "low_rank":
        a, b = torch.randn(d_rank, 3, generator=draw), torch.randn(3, d, generator=draw)
        return Compensation(bias, a, b)
    return Compensation(bias, w=torch.randn(d_rank, d, generator=draw)) if kind == "full" else Compensation(bias)


@pytest.mark.parametrize(("kind", "rank"), [("mean", 0), ("low_rank", 3), ("full", 0)])
def test_predictors_are_their_formulas(kind, rank):
    c = predictor(kind, 4, 6, 0)
    assert (c.kind, c.rank) == (kind, rank) and not any(p.requires_grad for p in c.parameters())
    z, partial = torch.randn(2, 5, 4), torch.randn(2, 5, 6)
    found = c(z, partial)
    for i in range(2):
        for t in range(5):
            expected = c.bias.clone()
            expected += z[i, t] @ c.w if kind == "full" else partial[i, t]
            if kind == "low_rank":
                expected += (z[i, t] @ c.a) @ c.b
            assert torch.allclose(found[i, t], expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["mean", "low_rank", "full"])
def test_only_what_the_mlp_reads_is_predicted(kind):
    """With values of zero attention gives nothing, so each rank's MLP reads x + bias, and the stream stays exact."""
    model = tiny.build("llama")
    layer, ids = model.model.layers[0], tiny.tokens(2, 6)
    with torch.no_grad():
        layer.self_attn.v_proj.weight.zero_()
    x = model.model.embed_tokens(ids)
    lm = TensorParallelLM.simulated(tiny.build("llama"), 2)
    for attention in lm.blocks[0].attentions:
        attention.v_proj.weight.data.zero_()
    c = predictor(kind, lm.blocks[0].d_rank, lm.blocks[0].width, 0)
    lm.set_strategies([DROP, KEEP, KEEP, KEEP])
    lm.set_compensation({0: {0: c, 1: c}})
    expected = x + layer.mlp(layer.post_attention_layernorm(x + c.bias))
    assert torch.allclose(lm.record(ids).streams[1].shared, expected, atol=1e-5)
    lm.set_strategies([KEEP] * 4)  # of kept sync points nothing is predicted
    assert torch.allclose(lm.record(ids).streams[1].shared, x + layer.mlp(layer.post_attention_layernorm(x)), atol=1e-5)
    lm.set_strategies([DROP, KEEP, KEEP, KEEP])
    lm.set_compensation({})
    assert torch.allclose(lm.record(ids).streams[1].shared, x + layer.mlp(layer.post_attention_layernorm(x)), atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "llama_bias"])
def test_a_predictor_that_is_the_ranks_own_share_changes_nothing(family):
    lm, ids = TensorParallelLM.simulated(tiny.build(family), 2), tiny.tokens(2, 6)
    lm.set_strategies([DROP, KEEP, KEEP, KEEP])
    plain = lm(ids)
    zero = torch.zeros(lm.blocks[0].width)
    o_proj = tiny.build(family).model.layers[0].self_attn.o_proj.weight
    shares = [o_proj[:, :32].T.detach().clone(), o_proj[:, 32:].T.detach().clone()]  # of 64 columns, by heads
    lm.set_compensation({0: {r: Compensation(zero, w=w.clone()) for r, w in enumerate(shares)}})
    assert torch.allclose(lm(ids), plain, atol=1e-5)
    a, b = torch.randn(lm.blocks[0].d_rank, 2), torch.randn(2, lm.blocks[0].width)
    lm.set_compensation({0: {r: Compensation(zero, a, b) for r in (0, 1)}})
    low = lm(ids)
    both = {r: Compensation(zero, w=w + a @ b) for r, w in enumerate(shares)}
    lm.set_compensation({0: both})
    assert torch.allclose(lm(ids), low, atol=1e-4) and not torch.allclose(low, plain, atol=1e-3)


def test_predictors_that_do_not_fit_are_refused():
    lm = TensorParallelLM.simulated(tiny.build("llama"), 2)
    block = lm.blocks[1]
    good = predictor("full", block.d_rank, block.width, 0)
    with pytest.raises(InputError, match=r"^Block 1 has no predictor for rank 1 of 2\.$"):
        block.set_compensation({0: good})
    for wrong in (predictor("full", block.d_rank + 1, block.width, 0), predictor("mean", 1, block.width + 1, 0)):
        with pytest.raises(InputError) as e:
            check_shapes(1, {0: good, 1: wrong}, block.d_rank, block.width)
        assert str(e.value) == "The compensation of block 1, rank 1, does not fit the model's heads and width."
        with pytest.raises(InputError, match="rank 1"):
            block.set_compensation({0: good, 1: wrong})
    half = TensorParallelLM.simulated(tiny.build("llama").to(torch.bfloat16), 2).blocks[1]
    half.set_compensation({0: good, 1: good})
    assert half.compensation[0].w.dtype == torch.bfloat16


@pytest.fixture
def planned(llama, tmp_path) -> Path:
    return write_plan(tmp_path / "plan.json", llama, 2, ["block_drop"] * 4, kinds=["mean", "low_rank", None, "full"])


def test_predictors_come_back_from_the_file_beside_the_plan(planned):
    plan, raw = read(Plan, planned), load_file(planned.with_name("compensation.safetensors"))
    found = load_compensation(plan, planned)
    assert {b: sorted(ranks) for b, ranks in found.items()} == {0: [0, 1], 1: [0, 1], 3: [0, 1]}
    assert [found[b][0].kind for b in found] == ["mean", "low_rank", "full"] and found[1][1].rank == RANK
    written = {}
    for block, predictors in found.items():
        written |= tensors_of(block, predictors)
    assert written.keys() == raw.keys() and all(torch.equal(written[k], raw[k]) for k in raw)
    assert all(t.dtype == torch.float32 and t.is_contiguous() for t in written.values())
    one = load_compensation(plan, planned, [1])
    assert {b: list(ranks) for b, ranks in one.items()} == {0: [1], 1: [1], 3: [1]}
    assert torch.equal(one[3][1].w, raw[tensor_name(3, 1, "w")]) and tensor_name(3, 1, "w") == "blocks.3.ranks.1.w"
    assert load_compensation(plan.model_copy(update={"compensation": None}), planned) == {}


def changed(planned: Path, change) -> tuple[Plan, str]:
    """The plan after `change` of its tensors, and the refusal of them."""
    file = planned.with_name("compensation.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    plan = read(Plan, planned)
    beside = plan.compensation.model_copy(update={"sha256": sha256_of(file)})
    plan = plan.model_copy(update={"compensation": beside})
    with pytest.raises(InputError) as e:
        load_compensation(plan, planned)
    return plan, str(e.value).removeprefix(str(file))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("blocks.1.ranks.0.a"), ": blocks.1.ranks.0.a is missing or not what it should be."),
        (lambda t: t.pop("blocks.0.ranks.1.bias"), ": blocks.0.ranks.1.bias is missing or not what it should be."),
        (lambda t: t["blocks.3.ranks.1.w"].fill_(torch.nan), ": blocks.3.ranks.1.w is missing or not what it should"),
        (lambda t: t.update({"blocks.1.ranks.1.b": torch.zeros(RANK + 1, 64)}), ": blocks.1.ranks.1.b is missing or"),
        (lambda t: t.update({"blocks.0.ranks.0.bias": torch.zeros(2, 64)}), ": blocks.0.ranks.0.bias is missing or"),
        (lambda t: t.update({"blocks.2.ranks.0.bias": torch.zeros(64), "z": torch.zeros(1)}), " holds blocks.2.ranks."),
    ],
)
def test_tensors_that_are_not_the_plans_are_refused(change, words, planned):
    plan, refusal = changed(planned, change)
    assert refusal.startswith(words)
    if "holds" in words:
        assert refusal == f" holds blocks.2.ranks.0.bias, which {planned} does not name."
        with pytest.raises(InputError, match=r"blocks\.2\.ranks\.0\.bias"):
            load_compensation(plan, planned, [0])


def test_the_file_beside_the_plan_is_the_one_it_was_written_with(planned, tmp_path):
    plan, file = read(Plan, planned), planned.with_name("compensation.safetensors")
    content = file.read_bytes()

    def refused() -> str:
        with pytest.raises(InputError) as e:
            load_compensation(plan, planned)
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
    plan = plan.model_copy(update={"compensation": plan.compensation.model_copy(update={"sha256": sha256_of(file)})})
    assert refused() == f"{file} is not a whole safetensors file; run `spd-calib recover` again."


REF = ModelRef(id="m", architecture="A", num_blocks=4, config_hash="0" * 64, weight_fingerprint="1" * 64)


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("architecture", "B", "architecture"),
        ("num_blocks", 5, "number of blocks"),
        ("config_hash", "2" * 64, "configuration"),
        ("weight_fingerprint", "2" * 64, "weights"),
    ],
)
def test_another_model_than_the_files(field, value, what):
    check_same_model(REF, REF.model_copy(update={"id": "elsewhere"}))
    with pytest.raises(InputError) as e:
        check_same_model(REF, REF.model_copy(update={"id": "n", field: value}))
    assert str(e.value) == (
        f"n is not the model this file was made for (m): the {what} differs; name the right one, or profile and plan "
        "anew."
    )


def test_the_versions_that_stand_in_files():
    import importlib.metadata

    assert versions() == {
        "spd_calib": importlib.metadata.version("spd-calib"),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
    }


@pytest.mark.parametrize("family", ["llama", "opt", "qwen3", "gemma"])
def test_a_small_copy_is_narrow_and_otherwise_the_same(family):
    config = tiny.build(family).config
    before = config.to_dict()
    narrow = _narrow(config).to_dict()
    assert config.to_dict() == before, "the configuration itself stays as it is"
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    shared = (getattr(config, "num_key_value_heads", None) or heads) != heads
    width = 2 * head_dim
    expected = {
        "num_attention_heads": 2, "num_key_value_heads": 1 if shared else 2, "hidden_size": width,
        "word_embed_proj_dim": width, "intermediate_size": width, "ffn_dim": width, "vocab_size": 64, "pad_token_id": 0,
    }  # fmt: skip
    for name in before:
        assert narrow[name] == (expected[name] if name in expected else before[name]), name
    assert "num_hidden_layers" in narrow and "XX" not in "".join(vars(_narrow(config)))


def test_positions_of_a_small_copy_are_bounded():
    config = tiny.build("llama").config
    config.max_position_embeddings = 2**20
    assert _narrow(config).max_position_embeddings == 2**17
    config.max_position_embeddings = 100
    assert _narrow(config).max_position_embeddings == 100


def test_what_is_settled_stays_dropped():
    lm, ids = TensorParallelLM.simulated(tiny.build("llama"), 2), tiny.tokens(2, 6)
    lm.set_strategies([DROP, KEEP, PLAIN, KEEP], [KEEP, DROP, KEEP, KEEP])
    both = lm(ids)
    lm.keep_all()
    dense = lm(ids)
    lm.settle([DROP, KEEP, KEEP, KEEP], [KEEP, DROP, KEEP, KEEP])
    settled = lm(ids)
    assert not torch.allclose(settled, dense, atol=1e-4)
    lm.set_strategies([KEEP, KEEP, PLAIN, KEEP])
    assert torch.equal(lm(ids), both)
    lm.keep_all()
    assert torch.equal(lm(ids), settled)
    for attention, mlp in (([KEEP] * 3, None), ([KEEP] * 4, [KEEP] * 3)):
        with pytest.raises(ValueError, match=r"^4 blocks, but [34] and [34] strategies$"):
            lm.set_strategies(attention, mlp)
    with pytest.raises(ValueError, match="an MLP sync point is kept or block-dropped, and the last one is kept"):
        lm.set_strategies([KEEP] * 4, [PLAIN, KEEP, KEEP, KEEP])
