"""Judging an engine that rounds: right and wrong ones, played by a simulation in bfloat16."""

import pytest
import tiny
import torch

from spd_calib.formats.drops import NOTHING_DROPPED, Drop, Drops, Point, Strategy
from spd_calib.models.predictor import Predictor
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.runtimes.observed import Observed
from spd_calib.runtimes.rounding import reading_rounded
from spd_calib.runtimes.simulation import simulate
from spd_calib.runtimes.vllm.as_served import judge, leaning, log_probs, neighbours, round_weights

K, D, P = "keep_sync", "block_drop", "plain_drop"
FIRST, THIRD = Point(0, "attention"), Point(2, "attention")
PROMPTS = [tiny.tokens(1, n, seed=n)[0].tolist() for n in (12, 9, 7)]
TOKENS = [tiny.tokens(1, 24, seed=90 + n)[0].tolist() for n in range(3)]


def predictors(seed: int) -> dict[int, Predictor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = (0.1 * torch.randn(9, 64, generator=generator) for _ in range(2 * 2))
    return {rank: Predictor(next(drawn)[0], w=next(drawn)[1:].reshape(8, 64).repeat(4, 1)) for rank in range(2)}


WITHOUT = Drops.of_blocks([D, K, D, P], [K, D, K, K])
PLAN = WITHOUT | Drops({THIRD: Drop(Strategy.BLOCK_DROP, predictors(0))})
ENGINES = {
    "right": PLAN,
    "no plan": NOTHING_DROPPED,
    "a drop missing": PLAN.only(p for p in PLAN if p != FIRST),
    "an extra drop": PLAN | Drops.of({Point(2, "mlp"): Strategy.BLOCK_DROP}),
    "plain for block drop": PLAN | Drops.of({FIRST: Strategy.PLAIN_DROP}),
    "predictors ignored": WITHOUT,
    "a stale predictor file": WITHOUT | Drops({THIRD: Drop(Strategy.BLOCK_DROP, predictors(1))}),
}


@pytest.fixture(scope="module")
def models():
    """The simulation in float32 on weights as bfloat16 rounds them, and one in bfloat16 throughout."""
    lm = TensorParallelLM.simulated(tiny.build("llama"), 2)
    round_weights(lm, "bfloat16")
    return lm, TensorParallelLM.simulated(tiny.build("llama").bfloat16(), 2)


def observed(narrow: TensorParallelLM, drops: Drops) -> Observed:
    run = simulate(narrow, PROMPTS, continuations=TOKENS, drops=drops)
    return Observed(prompt=run.prompt, tokens=TOKENS, chosen=run.chosen, all_reduces=[])


@pytest.mark.parametrize("engine", ENGINES)
def test_only_the_right_engine_passes(models, engine):
    lm, narrow = models
    samples = [observed(narrow, ENGINES[engine])]
    rounded = [log_probs(narrow, PLAN, PROMPTS, samples[0])]
    # what it is compared with must not be what plays the engine, bit by bit
    rounded[0] += 0.01 * torch.randn(rounded[0].shape, generator=torch.Generator().manual_seed(0))
    rows = judge(lm, PLAN, prompts=PROMPTS, samples=samples, rounded=rounded, dtype="bfloat16")
    assert all(row.ok for row in rows) == (engine == "right"), rows
    towards = {"a drop missing": "block 0 kept", "an extra drop": "block 2 MLP dropped",
               "plain for block drop": "block 0 plain-dropped",
               "predictors ignored": "block 2 without its predictor"}  # fmt: skip
    if engine in towards:
        assert rows[2].found == f"+1.00 ({towards[engine]})"


def test_a_change_that_changes_nothing_cannot_be_told_apart():
    off = torch.tensor([0.1, -0.1], dtype=torch.float64)
    assert leaning("x", off, torch.zeros(2, dtype=torch.float64)).spread == float("inf")
    half = leaning("x", torch.tensor([1.0, 0.5]), torch.tensor([2.0, 1.0]))
    assert half.share == pytest.approx(0.5) and half.spread == pytest.approx((1.25 / 2 / 5) ** 0.5)


def test_the_neighbours_of_a_plan():
    """Each sync point once for each other way to treat it; the last MLP's is none that can be dropped."""
    points = [Point(i, sublayer) for i in range(4) for sublayer in ("attention", "mlp")]
    found = neighbours(PLAN, 4)
    assert len(found) == 7 + 3 + 1  # 7 sync points, 3 attentions that can be dropped the other way, 1 predictor
    for name, other in found.items():
        (changed,) = (point for point in points if other.at(point) != PLAN.at(point))
        assert name.startswith(f"{changed} ")


@pytest.mark.parametrize("to", ["8-bit whole numbers", "8-bit floats"])
def test_inputs_are_rounded_as_a_loop_rounds_them(to):
    """On one rank, by token; and no longer when it is over."""
    ids = tiny.tokens(2, 7)
    lm, dense = TensorParallelLM.simulated(tiny.build("llama"), 1), tiny.build("llama")

    def by_token(_, args):
        rows = []
        for row in args[0].flatten(0, -2):
            scale = max(map(abs, row.tolist())) / (127 if to == "8-bit whole numbers" else 448)
            codes = [round(x / scale) for x in row.tolist()]
            whole = torch.tensor(codes) if to == "8-bit whole numbers" else (row / scale).to(torch.float8_e4m3fn)
            rows.append(whole.float() * scale)
        return (torch.stack(rows).reshape(args[0].shape),)

    before = lm(ids)
    with reading_rounded(lm, to):
        rounded = lm(ids)
    for layer in dense.model.layers:
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(by_token)
    with torch.no_grad():
        torch.testing.assert_close(rounded, dense(input_ids=ids).logits, rtol=0, atol=2e-2)
    assert (rounded - before).abs().max() > 2e-2
    assert torch.equal(lm(ids), before)
