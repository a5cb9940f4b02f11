"""Checking the engine that is served: started by the user's own arguments, in its own dtype, compiled or not.

Such an engine rounds, so no log-probability can be asked to be right to the fourth digit. It is judged by what tells
the plan from everything else: on tokens that it sampled itself, its log-probabilities must be as near to the simulated
plan as rounding in its dtype explains, nearer to it than to the dense model by a factor, and must not lean towards any
plan that differs at a single sync point.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spd_calib.formats.drops import NOTHING_DROPPED, Drop, Drops, Point, Strategy
from spd_calib.models.schemes import scheme_of
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.parallel.session import Session
from spd_calib.runtimes.checks import CheckRow, compare_counts, folder_of
from spd_calib.runtimes.observed import Observed
from spd_calib.runtimes.rounding import reading_rounded
from spd_calib.runtimes.simulation import simulate

from .check import all_reduces_expected
from .engine import start_served

ROUNDS = 16  # of samples behind each prompt, at most; as many are used as it takes
ROUNDING = 2.0  # how far off the plan the engine may be, in units of what rounding does in the simulation
FACTOR = 4.0  # how much nearer to the plan than to the dense model it must be
SHARE = 0.5  # how far it may lean towards a plan that differs at one sync point: 0 is the plan, 1 the other
SPREAD = 0.1  # the standard error of that share, at most
FLOOR = 1e-4  # of a log-probability: what rounding in float32 may do


def check_as_served(
    session: Session, plan: Path, *, drops: Drops, prompts: Sequence[str], new_tokens: int, arguments: Sequence[str]
) -> list[CheckRow]:
    """Start vLLM with the plan and `arguments`, those of `vllm serve`, and judge what it samples behind the prompts.

    `drops` are what `plan` holds, with the predictors of all ranks. Raises InputError where vLLM, its arguments or the
    plan cannot be used.
    """
    ids = [session.tokenizer(p)["input_ids"] for p in prompts]
    longest = max(map(len, ids)) + new_tokens
    with start_served(folder_of(session), tp=session.tp, plan=plan, arguments=arguments, longest=longest) as engine:
        samples = [engine.observe(ids, new_tokens=new_tokens, seed=seed) for seed in range(ROUNDS)]
        vocabulary, dtype, traced = engine.vocabulary(), engine.dtype, engine.traced_all_reduces()
    narrow = session.load("cpu", dtype)
    narrow.head.cut_at(vocabulary)
    scheme = scheme_of(session.config)
    with reading_rounded(narrow, scheme.reads if scheme else ""):
        rounded = [log_probs(narrow, drops, ids, sample) for sample in samples]
    del narrow
    lm = session.load("cpu", "float32")
    lm.head.cut_at(vocabulary)
    round_weights(lm, dtype)
    expected = all_reduces_expected(lm, drops)
    counts = [count for sample in samples for rank in sample.all_reduces for count in rank]
    if any(traced):
        row = compare_counts("as served: all-reduces in the compiled graph of each rank", expected, found=traced)
    else:
        row = compare_counts("as served: all-reduces per forward and rank", expected, found=counts)
    return [*judge(lm, drops, prompts=ids, samples=samples, rounded=rounded, dtype=dtype), row]


@torch.no_grad()
def round_weights(lm: TensorParallelLM, dtype: str) -> None:
    """Round the weights of `lm` to `dtype`, as an engine does that loads them in it; lm goes on in its own.

    Where blocks are read from disk as they are used, theirs stay as they are stored.
    """
    for parameter in lm.model.parameters():
        parameter.copy_(parameter.to(getattr(torch, dtype)))


@dataclass(frozen=True)
class Leaning:
    """Says how far an engine leans from the plan towards another one: `share` of the way, give or take `spread`."""

    towards: str
    share: float
    spread: float


def judge(
    lm: TensorParallelLM,
    drops: Drops,
    *,
    prompts: Sequence[Sequence[int]],
    samples: Sequence[Observed],
    rounded: Sequence[Tensor],
    dtype: str,
) -> list[CheckRow]:
    """Compare what an engine sampled behind the prompts, round by round, with the plan and everything near it.

    `lm` simulates in float32; `rounded` holds the log-probabilities that the simulated plan gives the same tokens in
    `dtype`, one tensor a round. As many rounds are looked at as it takes to tell each change of one sync point apart.
    """
    off_plan, off_dense, off_by_rounding = [], [], []  # log-probabilities less others', round by round
    others = neighbours(drops, lm.num_blocks)
    apart: dict[str, list[Tensor]] = {name: [] for name in others}
    leanings: list[Leaning] = []
    for sample, narrow in zip(samples, rounded, strict=True):
        found, plan = _flat(sample.prompt, sample.chosen), log_probs(lm, drops, prompts, sample)
        off_plan.append(found - plan)
        off_dense.append(found - log_probs(lm, NOTHING_DROPPED, prompts, sample))
        off_by_rounding.append(narrow - plan)
        for name, other in others.items():
            apart[name].append(log_probs(lm, other, prompts, sample) - plan)
        off = torch.cat(off_plan)
        leanings = [leaning(name, off, torch.cat(differences)) for name, differences in apart.items()]
        if max(found_at.spread for found_at in leanings) <= SPREAD:
            break
    distance, rounding = _rms(torch.cat(off_plan)), _rms(torch.cat(off_by_rounding)) + FLOOR
    tokens = sum(map(len, off_plan))
    worst = max(leanings, key=lambda at: abs(at.share))
    blurred = max(leanings, key=lambda at: at.spread)
    rows = [
        CheckRow(
            "as served: log p off the simulated plan, rms",
            f"≤ {ROUNDING:g} × {rounding:.1e}, what {dtype} does",
            f"{distance:.1e}",
            distance <= ROUNDING * rounding,
        )
    ]
    if drops:
        nearer = _rms(torch.cat(off_dense)) / distance
        what = "as served: nearer to the plan than to the dense model"
        rows.append(CheckRow(what, f"≥ {FACTOR:g} times", f"{nearer:.1f} times", nearer >= FACTOR))
    return [
        *rows,
        CheckRow(
            "as served: leaning towards any plan that differs at one sync point",
            f"≤ {SHARE:g} of the way",
            f"{worst.share:+.2f} ({worst.towards})",
            abs(worst.share) <= SHARE,
        ),
        CheckRow(
            "as served: standard error of that",
            f"≤ {SPREAD:g}",
            f"{blurred.spread:.3f} ({blurred.towards}) on {tokens} tokens",
            blurred.spread <= SPREAD,
        ),
    ]


def leaning(towards: str, off: Tensor, apart: Tensor) -> Leaning:
    """Return how far `off` [N], the engine's log-probabilities less the plan's, goes along `apart` [N], the other's."""
    squared = float(apart @ apart)
    if squared == 0.0:
        return Leaning(towards, 0.0, float("inf"))
    return Leaning(towards, float(off @ apart) / squared, _rms(off) / squared**0.5)


def neighbours(drops: Drops, num_blocks: int) -> dict[str, Drops]:
    """Return the drops that differ from `drops` at one sync point, by what is different there."""
    found = {}
    for i in range(num_blocks):
        attention, mlp = Point(i, "attention"), Point(i, "mlp")
        points = (attention, mlp) if i < num_blocks - 1 else (attention,)
        for point in points:
            drop = drops.at(point)
            if point not in drops:
                found[f"{point} dropped"] = drops | Drops.of({point: Strategy.BLOCK_DROP})
                continue
            found[f"{point} kept"] = drops.only(p for p in drops if p != point)
            if drop.predictors is not None:
                found[f"{point} without its predictor"] = drops | Drops({point: Drop(drop.strategy)})
            if point is attention:
                plain = drop.strategy == Strategy.PLAIN_DROP
                other, how = (Strategy.BLOCK_DROP, "block") if plain else (Strategy.PLAIN_DROP, "plain")
                found[f"{point} {how}-dropped"] = drops | Drops.of({point: other})
    return found


def log_probs(lm: TensorParallelLM, drops: Drops, prompts: Sequence[Sequence[int]], sample: Observed) -> Tensor:
    """Return the log-probability of every token but the prompts' first ones, [N] in float64."""
    run = simulate(lm, prompts, continuations=sample.tokens, drops=drops)
    return _flat(run.prompt, run.chosen)


def _flat(prompt: Sequence[Sequence[float]], chosen: Sequence[Sequence[float]]) -> Tensor:
    values = [value for rows in (prompt, chosen) for row in rows for value in row]
    return torch.tensor(values, dtype=torch.float64)


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())
