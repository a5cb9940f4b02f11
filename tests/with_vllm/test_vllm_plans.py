"""Every family under every strategy on a real engine, against the simulation and the independent reference."""

from typing import NamedTuple

import pytest
import reference
import tiny
import torch
from conftest import build
from plans import write_plan

from spd_calib.errors import SpdError
from spd_calib.formats.drops import NOTHING_DROPPED, Drops, Point, Strategy
from spd_calib.models.plan_files import load_plan
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.runtimes.observed import Observed
from spd_calib.runtimes.vllm.check import TOLERANCE, compare
from spd_calib.runtimes.vllm.engine import Engine, start

K, D, P = "keep_sync", "block_drop", "plain_drop"
PLANS = {
    "mixed": (Drops.of_blocks([D, P, K, P]), 6),
    "mixed-again": (Drops.of_blocks([P, K, D, D]), 6),
    "all-dropped": (Drops.of_blocks([D, D, D, D]), 5),
    "all-plain": (Drops.of_blocks([P, P, P, P]), 5),
    "mlp": (Drops.of_blocks([K, D, K, D], [D, K, D, K]), 5),
    "mlp-and-plain": (Drops.of_blocks([D, P, K, P], [D, D, K, K]), 4),
    "least": (Drops.of_blocks([D, D, D, D], [D, D, D, K]), 2),
}
"""Name -> what is dropped, all-reduces of one forward (9 with everything kept)."""

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
    dense: Observed
    family: str
    tp: int


@pytest.fixture(scope="module", params=MODELS, ids=lambda m: f"{m[0]}-tp{m[1]}")
def case(request, folder_of):
    family, tp = request.param
    with start(folder_of(family), tp=tp, max_length=64) as engine:
        lm = TensorParallelLM.simulated(build(family), tp)
        lm.head.cut_at(engine.vocabulary())  # vLLM pads the vocabulary before it cuts it
        yield Case(engine, lm, engine.observe(PROMPTS, new_tokens=NEW), family, tp)


def run(case: Case, drops: Drops, *, predictors_of=None) -> Observed:
    """What the engine does with the prompts under `drops`."""
    case.engine.set(drops, predictors_of=predictors_of)
    return case.engine.observe(PROMPTS, new_tokens=NEW)


def compared(case: Case, drops: Drops, observed: Observed) -> list:
    """The rows of a check that expects `drops` of what the engine did."""
    return compare(case.lm, drops, prompts=PROMPTS, planned=observed, dense=case.dense)


def check(rows):
    """Every row holds; shown with -rP, and with -s."""
    for row in rows:
        print(f"{row.what}: expected {row.expected}, found {row.found}")
    assert not [row for row in rows if not row.ok]


def assert_dense(case: Case, observed: Observed) -> None:
    """What the engine did before any plan was set; not bit for bit, since its first batch may hold a prompt fewer."""
    for found, expected in zip(observed.prompt, case.dense.prompt, strict=True):
        assert found == pytest.approx(expected, abs=1e-5)


def test_no_plan_is_the_dense_model(case):
    assert {count for rank in case.dense.all_reduces for count in rank} == {9}
    check(compared(case, NOTHING_DROPPED, case.dense))


@pytest.mark.parametrize("plan", PLANS)
def test_the_plan_is_run(case, plan):
    drops, all_reduces = PLANS[plan]
    observed = run(case, drops)
    assert len(observed.all_reduces) == case.tp
    assert {count for rank in observed.all_reduces for count in rank} == {all_reduces}
    check(compared(case, drops, observed))


COMPENSATED = ((D, D, D, D), (K, D, K, K), ("mean", "low_rank", "full", None))
"""Attention and MLP strategies, and what kind of predictor each block has."""


def test_a_compensation_is_run(case, folder_of, tmp_path):
    path = write_plan(tmp_path / "plan.json", folder_of(case.family), case.tp, *COMPENSATED)
    plan, drops = load_plan(path)
    check(compared(case, drops, run(case, drops, predictors_of=path)))
    rows = compared(case, drops, run(case, plan.drops))  # a runtime that ignores the predictors
    failed = {row.what for row in rows if not row.ok}
    assert "plan: prompt tokens" in failed and "plan: all-reduces per forward and rank" not in failed


def test_against_the_reference(case):
    attention, mlp = [K, D, K, D], [D, K, D, K]  # the reference cuts the vocabulary elsewhere: no plain drops
    case.engine.set(Drops.of_blocks(attention, mlp))
    observed = case.engine.observe(PROMPTS[1:2], new_tokens=1)
    ids = torch.tensor(PROMPTS[1:2])
    log_p = reference.logits(build(case.family), ids, case.tp, attention, mlp)[0].log_softmax(-1)
    expected = log_p[:-1].gather(-1, ids[0, 1:, None])[:, 0]
    assert (torch.tensor(observed.prompt[0]) - expected).abs().max() <= TOLERANCE


def test_a_plan_taken_back_is_the_dense_model(case):
    case.engine.set(PLANS["mlp-and-plain"][0])
    assert_dense(case, run(case, NOTHING_DROPPED))


def test_a_runtime_that_ignores_the_plan_is_caught(case):
    rows = compared(case, PLANS["mixed"][0], case.dense)
    failed = {row.what for row in rows if not row.ok}
    assert {
        "plan: prompt tokens",
        "plan: all-reduces per forward and rank",
        "plan against dense: max |Δ log p|",
    } <= failed


def test_plain_drops_in_place_of_block_drops_are_caught(case):
    observed = run(case, Drops.of_blocks([P, K, P, K]))
    rows = compared(case, Drops.of_blocks([D, K, D, K]), observed)
    failed = {row.what for row in rows if not row.ok}
    assert "plan: prompt tokens" in failed
    assert "plan: all-reduces per forward and rank" not in failed  # the counts alone cannot tell


def test_workers_return_their_errors_and_stay_in_step(case):
    for sync_point, words in (("attention", "block 4"), ("mlp", "block 3 MLP")):
        beyond = Point(int(words.split()[1]), sync_point)
        with pytest.raises(SpdError, match=f"{words} is no sync point that can be dropped in a model of 4 blocks"):
            case.engine.set(Drops.of({beyond: Strategy.BLOCK_DROP}))
    assert_dense(case, run(case, NOTHING_DROPPED))
