"""Every family under every strategy on a real engine, against the simulation and the independent reference."""

from typing import NamedTuple

import pytest
import reference
import tiny
import torch
from conftest import build
from plans import write_plan

from spd_calib.errors import SpdError
from spd_calib.formats.common import Strategy
from spd_calib.formats.files import read
from spd_calib.formats.plan import Plan
from spd_calib.parallel.compensation import load_compensation
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.runtimes.vllm.check import TOLERANCE, compare
from spd_calib.runtimes.vllm.engine import Engine, Seen, start

K, D, P = "keep_sync", "block_drop", "plain_drop"
PLANS = {
    "mixed": ((D, P, K, P), None, 6),
    "mixed-again": ((P, K, D, D), None, 6),
    "all-dropped": ((D, D, D, D), None, 5),
    "all-plain": ((P, P, P, P), None, 5),
    "mlp": ((K, D, K, D), (D, K, D, K), 5),
    "mlp-and-plain": ((D, P, K, P), (D, D, K, K), 4),
    "least": ((D, D, D, D), (D, D, D, K), 2),
}
"""Name -> attention strategies, MLP strategies, all-reduces of one forward (9 with everything kept)."""

MODELS = [
    ("llama", 2),
    ("llama_bias", 2),
    ("mistral", 2),
    ("qwen2", 2),
    ("qwen3", 2),
    ("gemma", 2),
    ("opt", 2),
    ("llama_bias", 4),
]
PROMPTS = [tiny.tokens(1, n, seed=n)[0].tolist() for n in (21, 9, 14)]
NEW = 6


class Case(NamedTuple):
    """An engine on one model without a plan, its simulation, and what the engine did before any plan was set."""

    engine: Engine
    lm: TensorParallelLM
    dense: Seen
    family: str
    tp: int


@pytest.fixture(scope="module", params=MODELS, ids=lambda m: f"{m[0]}-tp{m[1]}")
def case(request, folder_of):
    family, tp = request.param
    with start(folder_of(family), tp, 64) as engine:
        lm = TensorParallelLM.simulated(build(family), tp)
        yield Case(engine, lm, engine.see(PROMPTS, NEW), family, tp)


def check(rows):
    """Every row holds; shown with -rP, and with -s."""
    for row in rows:
        print(f"{row.what}: expected {row.expected}, found {row.found}")
    assert not [row for row in rows if not row.ok]


def test_no_plan_is_the_dense_model(case):
    assert {count for rank in case.dense.all_reduces for count in rank} == {9}
    check(compare(case.lm, [Strategy.KEEP_SYNC] * 4, [Strategy.KEEP_SYNC] * 4, PROMPTS, case.dense, case.dense))


@pytest.mark.parametrize("plan", PLANS)
def test_the_plan_is_run(case, plan):
    attention, mlp, all_reduces = PLANS[plan]
    mlp = mlp or (K,) * 4
    case.engine.set(attention, mlp)
    seen = case.engine.see(PROMPTS, NEW)
    assert len(seen.all_reduces) == case.tp
    assert {count for rank in seen.all_reduces for count in rank} == {all_reduces}
    check(compare(case.lm, [Strategy(s) for s in attention], [Strategy(s) for s in mlp], PROMPTS, seen, case.dense))


COMPENSATED = ((D, D, D, D), (K, D, K, K), ("mean", "low_rank", "full", None))
"""Attention and MLP strategies, and what kind of predictor each block has."""


def test_a_compensation_is_run(case, folder_of, tmp_path):
    attention, mlp, kinds = COMPENSATED
    plan = write_plan(tmp_path / "plan.json", folder_of(case.family), case.tp, attention, mlp, kinds)
    strategies = [Strategy(s) for s in attention], [Strategy(s) for s in mlp]
    case.lm.set_compensation(load_compensation(read(Plan, plan), plan))
    case.engine.set(attention, mlp, plan)
    check(compare(case.lm, *strategies, PROMPTS, case.engine.see(PROMPTS, NEW), case.dense))
    case.engine.set(attention, mlp)  # a runtime that ignores the predictors
    rows = compare(case.lm, *strategies, PROMPTS, case.engine.see(PROMPTS, NEW), case.dense)
    failed = {row.what for row in rows if not row.ok}
    assert "plan: prompt tokens" in failed and "plan: all-reduces per forward and rank" not in failed
    case.lm.set_compensation({})


def test_against_the_reference(case):
    attention, mlp, _ = PLANS["mlp"]  # the reference cuts the vocabulary elsewhere: no plain drops
    case.engine.set(attention, mlp)
    seen = case.engine.see(PROMPTS[1:2], 1)
    ids = torch.tensor(PROMPTS[1:2])
    log_p = reference.logits(build(case.family), ids, case.tp, attention, mlp)[0].log_softmax(-1)
    expected = log_p[:-1].gather(-1, ids[0, 1:, None])[:, 0]
    assert (torch.tensor(seen.prompt[0]) - expected).abs().max() <= TOLERANCE


def test_a_plan_taken_back_is_the_dense_model(case):
    case.engine.set(PLANS["mlp-and-plain"][0], PLANS["mlp-and-plain"][1])
    case.engine.set([K] * 4)
    assert case.engine.see(PROMPTS, NEW).prompt == case.dense.prompt


def test_a_runtime_that_ignores_the_plan_is_caught(case):
    attention = [Strategy(s) for s in PLANS["mixed"][0]]
    rows = compare(case.lm, attention, [Strategy.KEEP_SYNC] * 4, PROMPTS, case.dense, case.dense)
    failed = {row.what for row in rows if not row.ok}
    assert {
        "plan: prompt tokens",
        "plan: all-reduces per forward and rank",
        "plan against dense: max |Δ log p|",
    } <= failed


def test_plain_drops_in_place_of_block_drops_are_caught(case):
    case.engine.set([P, K, P, K])
    seen = case.engine.see(PROMPTS, NEW)
    planned = [Strategy.BLOCK_DROP, Strategy.KEEP_SYNC] * 2
    rows = compare(case.lm, planned, [Strategy.KEEP_SYNC] * 4, PROMPTS, seen, case.dense)
    failed = {row.what for row in rows if not row.ok}
    assert "plan: prompt tokens" in failed
    assert "plan: all-reduces per forward and rank" not in failed  # the counts alone cannot tell


def test_workers_return_their_errors_and_stay_in_step(case):
    with pytest.raises(SpdError, match="3 blocks"):
        case.engine.set([K] * 3)
    with pytest.raises(SpdError, match="last one is kept"):
        case.engine.set([K] * 4, [D] * 4)
    case.engine.set([K] * 4)
    assert case.engine.see(PROMPTS, NEW).prompt == case.dense.prompt
