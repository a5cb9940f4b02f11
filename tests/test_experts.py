"""Mixtures of experts: every family against the naive reference, and routers that agree on all ranks to the bit."""

from pathlib import Path

import pytest
import reference
import tiny
import torch
from safetensors.torch import load_file, save_file

from spd_calib.errors import InputError
from spd_calib.formats.drops import Drop, Drops, Point, Strategy
from spd_calib.formats.files import read
from spd_calib.formats.profile import Profile
from spd_calib.models.predictor import Predictor
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.parallel.session import open_session

BLOCKS, HIDDEN = tiny.SHAPE["num_hidden_layers"], tiny.SHAPE["hidden_size"]
KEEP = ["keep_sync"] * BLOCKS
PLANS = {
    "keep": (KEEP, KEEP),
    "attention": (["block_drop"] * BLOCKS, KEEP),
    "mlp": (KEEP, ["block_drop"] * (BLOCKS - 1) + ["keep_sync"]),
    "mixed": (
        ["keep_sync", "block_drop", "keep_sync", "block_drop"],
        ["block_drop", "block_drop", "keep_sync", "keep_sync"],
    ),
}
"""Name -> strategies of attention, strategies of the MLP."""


LONG = "long"  # a checkpoint with 640 positions
DECODED = ("gpt_oss", "deepseek_v3")  # windows and sinks; a cache of latents


def plans_of(lm: TensorParallelLM) -> dict[str, Drops]:
    """PLANS, and one with a router's predictor wherever it can be."""
    drops = {name: Drops.of_blocks(*strategies) for name, strategies in PLANS.items()}
    generator = torch.Generator().manual_seed(1)
    router = Predictor(torch.zeros(HIDDEN), w=torch.randn(HIDDEN, HIDDEN, generator=generator) / 8)
    predicting = {Point(b.index, "attention"): Drop(Strategy.BLOCK_DROP, router=router) for b in lm.blocks if b.experts}
    return {**drops, "routers": drops["attention"] | Drops(predicting)}


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def planned(lm: TensorParallelLM, drops: Drops, ids: torch.Tensor) -> torch.Tensor:
    with lm.running(drops):
        return lm(ids)


@pytest.mark.parametrize("family", tiny.MIXTURES)
def test_the_reference_is_the_dense_model(family: str) -> None:
    model, ids = tiny.build(family), tiny.tokens(2, 8)
    with torch.no_grad():
        assert gap(reference.logits(model, ids, 4, KEEP), model(ids).logits) < 1e-5


def test_a_mixture_is_profiled_without_plain_drops(spd, text, tmp_path) -> None:
    """By default; asked for, they are refused before anything is measured, and nothing is left behind."""
    folder, out = tiny.save(tiny.build("mixtral"), tmp_path / "model"), tmp_path / "profile.json"
    given = ("--tp", 2, "--data", text, "--seq-len", 24, "--max-samples", 8, "--verify-samples", 8, "--device", "cpu")
    run = spd("profile", folder, *given, "--strategy", "plain_drop", "-o", out)
    assert run.code == 2 and "use block_drop" in run.err and sorted(tmp_path.iterdir()) == [folder]
    assert spd("profile", folder, *given, "-o", out).code == 0
    assert {m.strategy for m in read(Profile, out).measurements} == {Strategy.BLOCK_DROP}


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2"])
def test_in_bfloat16_rounding_may_flip_a_few_choices_but_not_most(family: str) -> None:
    probe, dense, lm = tiny.tokens(2, 16), *(tiny.build(family).to(torch.bfloat16) for _ in range(2))
    lm = TensorParallelLM.simulated(lm, 2)  # where one token's choice flips, its logits are off by 0.5 and more
    with torch.no_grad():
        lm._check_equals_dense(dense(probe).logits, probe)
        lm.blocks[1].outs[0].weight.mul_(3)  # as another form would be
        with pytest.raises(InputError, match="does not know of"):
            lm._check_equals_dense(dense(probe).logits, probe)


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("family", tiny.MIXTURES)
def test_every_strategy_is_the_reference(family: str, tp: int) -> None:
    model, ids = tiny.build(family), tiny.tokens(2, 8)
    expected = {name: reference.logits(model, ids, tp, *strategies) for name, strategies in PLANS.items()}
    lm = TensorParallelLM.simulated(model, tp)
    for name, strategies in PLANS.items():
        assert gap(planned(lm, Drops.of_blocks(*strategies), ids), expected[name]) < 1e-5, name
        assert name == "keep" or gap(expected[name], expected["keep"]) > 1e-3  # the plan does show


@pytest.mark.parametrize("kind", ["mean", "low_rank", "full"])
def test_a_router_reads_what_its_predictor_expects(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    model, ids = tiny.build("mixtral"), tiny.tokens(2, 8)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / 4

    bias, a, b, w = drawn(HIDDEN), drawn(HIDDEN, 3), drawn(3, HIDDEN), drawn(HIDDEN, HIDDEN)
    predictors = {"mean": Predictor(bias), "low_rank": Predictor(bias, a=a, b=b), "full": Predictor(bias, w=w)}
    slopes = {"mean": torch.zeros(HIDDEN, HIDDEN), "low_rank": a @ b, "full": w}
    routers = {block: (slopes[kind].double(), bias.double()) for block in (1, 3)}
    attention, mlp = PLANS["mixed"]
    expected = reference.logits(model, ids, 4, attention, mlp, routers=routers)
    without = reference.logits(model, ids, 4, attention, mlp)
    lm = TensorParallelLM.simulated(model, 4)
    drop = Drop(Strategy.BLOCK_DROP, router=predictors[kind])
    drops = Drops.of_blocks(attention, mlp) | Drops({Point(block, "attention"): drop for block in routers})
    assert gap(planned(lm, drops, ids), expected) < 1e-5
    assert gap(expected, without) > 1e-3


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_what_the_ranks_experts_give_of_one_stream_is_what_the_model_gives(family: str) -> None:
    """With a shared expert, and with biases of the chosen experts, too: the sum of all ranks and what they left out."""
    layer, ids = tiny.build(family).model.layers[2], tiny.tokens(2, 8)
    lm = TensorParallelLM.simulated(tiny.build(family), 4)
    x = lm.record(ids).streams[2]
    with torch.no_grad():
        fed = lm.blocks[2].feed(x)
        found = layer.mlp(layer.post_attention_layernorm(x.shared))
    expected = found[0] if isinstance(found, tuple) else found
    assert gap(sum(fed.partials) + (0 if fed.bias is None else fed.bias), expected) < 1e-5
    assert (fed.bias is not None) == (family == "gpt_oss")


def test_what_a_mixture_cannot_do_is_refused() -> None:
    lm = TensorParallelLM.simulated(tiny.build("qwen2_moe"), 2)
    plain = Drops({Point(3, "attention"): Drop(Strategy.PLAIN_DROP)})
    with pytest.raises(InputError, match="choose different experts"), lm.running(plain):
        pass
    router = Drop(Strategy.BLOCK_DROP, router=Predictor(torch.zeros(HIDDEN)))
    with pytest.raises(InputError, match="Block 1 has no router"), lm.running(Drops({Point(1, "attention"): router})):
        pass
    narrow = Drop(Strategy.BLOCK_DROP, router=Predictor(torch.zeros(HIDDEN - 1)))
    with pytest.raises(InputError, match="does not fit"), lm.running(Drops({Point(0, "attention"): narrow})):
        pass
    with pytest.raises(InputError, match="50 neurons of the shared experts"):
        TensorParallelLM.simulated(tiny.build("qwen2_moe", shared_expert_intermediate_size=50), 4)


@pytest.mark.parametrize("tp", [2, 4])
def test_real_ranks_are_the_simulation_and_their_routers_agree_to_the_bit(tp: int, tmp_path: Path) -> None:
    from test_distributed import WORKERS, torchrun

    for family in tiny.MIXTURES:
        tiny.save(tiny.build(family), tmp_path / family)
    tiny.save(tiny.build("mixtral", positions=640), tmp_path / LONG)
    done = torchrun(tp, WORKERS / "run_mixtures.py", tp, tmp_path)
    assert done.returncode == 0, done.stderr[:2000]
    seen = torch.load(tmp_path / f"mixtures_{tp}.pt")
    for family in tiny.MIXTURES:
        lm = TensorParallelLM.simulated(tiny.build(family), tp)
        for name, drops in plans_of(lm).items():
            assert gap(seen[family][name], planned(lm, drops, tiny.tokens(2, 8))) < 1e-5, (family, name)
        if family in DECODED:  # with its cache as without any
            ids = reference.generate(tiny.build(family), tiny.tokens(2, 8), tp, PLANS["mixed"][0], 6, PLANS["mixed"][1])
            assert torch.equal(seen[family]["decoded"], ids)
    assert len(seen[LONG]) == tp and len(seen[LONG][0]) == BLOCKS
    assert all(digests == seen[LONG][0] for digests in seen[LONG])


def test_experts_are_read_as_they_are_stored(tmp_path: Path) -> None:
    """Stored one by one, read stacked: whole, block by block; a lost or a doubled piece is named."""
    ids = tiny.tokens(2, 8)
    for family in ("mixtral", "qwen2_moe"):  # w1, w2, w3 and other names
        folder = tiny.save(tiny.build(family), tmp_path / family)
        with torch.no_grad():
            expected = tiny.build(family)(ids).logits
        session = open_session(str(folder), 4)
        assert gap(session.load()(ids), expected) < 1e-5
        assert gap(session.load(stream=True)(ids), expected) < 1e-5
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    save_file({n: t for n, t in stored.items() if n != name}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="lack a part of expert 3 for model"):
        open_session(str(folder), 4)
    both = {**stored, "model.layers.0.mlp.experts.down_proj": torch.zeros(6, 64, 32)}
    save_file(both, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="twice, stacked and expert by expert"):
        open_session(str(folder), 4)
    save_file({**stored, name: torch.zeros(31, 64)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="has the shape"):
        open_session(str(folder), 4)
