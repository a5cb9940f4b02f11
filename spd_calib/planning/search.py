"""From a profile to a plan: which blocks to drop, in which way, so that the whole keeps its budget.

Sets are not sums: the order comes from single measurements, but how far to go down it is measured on whole plans.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from spd_calib.errors import InputError, SpdError
from spd_calib.formats.common import Strategy
from spd_calib.formats.plan import Budget
from spd_calib.formats.profile import Comparison, Measurement, Profile

from .budget import METRICS, OPTIONS, cost, describe, kept

Drops = dict[int, Strategy]  # block -> how its attention sync point is dropped
Measure = Callable[[Drops], Comparison]  # one whole plan


@dataclass(frozen=True)
class Candidate:
    """The one way in which a block would be dropped, and why that one."""

    block: int
    strategy: Strategy
    measurement: Measurement
    reason: str


@dataclass(frozen=True)
class Choice:
    """The blocks dropped, and what they cost on text that was not used to choose them."""

    dropped: list[Candidate]
    verified: Comparison
    repaired: int  # blocks given back because the held-out text said so


def candidates(profile: Profile, budget: Budget) -> list[Candidate]:
    """Every block with the cheapest strategy it tolerates, least sensitive first in the budget's own metric."""
    allowed: list[Strategy] = [s for s in (Strategy.PLAIN_DROP, Strategy.BLOCK_DROP) if s in budget.strategies]
    measured = {s: profile.of(s) for s in allowed}
    if missing := [s for s in allowed if not measured[s]]:
        raise InputError(
            f"The profile holds no measurement of {missing[0]}; profile again with --strategy {missing[0]}."
        )
    if not allowed:
        raise InputError("--strategy keep_sync alone leaves nothing to plan; allow block_drop or plain_drop.")
    metric = METRICS.get(budget.kind, profile.rank_by)
    costs = {s: profile.sensitivity(s, metric) for s in allowed}
    kl = {s: profile.sensitivity(s, "kl") for s in allowed}
    found = [_cheapest(block, measured) for block in range(profile.model.num_blocks)]
    return sorted(found, key=lambda c: (costs[c.strategy][c.block], kl[c.strategy][c.block], c.block))


def _cheapest(block: int, measured: Mapping[Strategy, dict[int, Measurement]]) -> Candidate:
    """plain_drop needs no change to the block, but only where it measures as harmless: no worse than block_drop."""
    if len(measured) == 1:
        strategy = next(iter(measured))
        return Candidate(block, strategy, measured[strategy][block], "the only strategy allowed")
    plain, drop = measured[Strategy.PLAIN_DROP][block], measured[Strategy.BLOCK_DROP][block]
    if plain.kl <= drop.kl + 2 * drop.kl_stderr:
        return Candidate(block, Strategy.PLAIN_DROP, plain, "plain drop measures no worse than block drop")
    return Candidate(block, Strategy.BLOCK_DROP, drop, f"plain drop would cost KL {plain.kl:.3g}")


def choose(profile: Profile, budget: Budget, calibrate: Measure, verify: Measure) -> Choice:
    """Pick blocks for `budget`: `calibrate` measures a whole plan on the text of the profile, `verify` on other text.

    The longest run of candidates that keeps the budget is found by bisection on the calibration text, then verified,
    and given back block by block while the held-out text says it breaks the budget. Raises SpdError, naming the best
    plan found, where not even one sync point can go.
    """
    order = candidates(profile, budget)
    if budget.kind == "drop":
        order = order[: int(budget.value)]
        return Choice(order, verify(drops_of(order)), 0)
    if budget.kind == "tau":
        order = [c for c in order if tier(profile, budget, c) == "insensitive"]
        return Choice(order, verify(drops_of(order)), 0)
    low, high = 0, len(order)  # `low` candidates are known to keep the budget
    middle = min(max(_predicted_length(profile, budget, order), 1), high)
    while low < high:
        if kept(budget, calibrate(drops_of(order[:middle]))):
            low = middle
        else:
            high = middle - 1
        middle = (low + high + 1) // 2
    for n in range(low, 0, -1):
        verified = verify(drops_of(order[:n]))
        if kept(budget, verified):
            return Choice(order[:n], verified, low - n)
    raise _impossible(budget, order[0], verify(drops_of(order[:1])))


def drops_of(chosen: Sequence[Candidate]) -> Drops:
    return {c.block: c.strategy for c in chosen}


def tier(profile: Profile, budget: Budget, candidate: Candidate) -> str:
    """The paper's classes, by perplexity sensitivity against tau1 and tau2 (section 4.3)."""
    sensitivity = profile.sensitivity(candidate.strategy, "ppl")[candidate.block]
    if sensitivity <= budget.value:
        return "insensitive"
    return "sensitive" if sensitivity <= (budget.tau2 or budget.value) else "extremely sensitive"


def _predicted_length(profile: Profile, budget: Budget, order: Sequence[Candidate]) -> int:
    """How many candidates the sum of single costs says will fit: where the bisection starts."""
    spent, n = 0.0, 0
    for c in order:
        m = c.measurement if profile.method == "single" else None
        spent += {
            "max_kl": m.kl if m else profile.sensitivity(c.strategy, "kl")[c.block],
            "max_ppl_increase": profile.sensitivity(c.strategy, "ppl")[c.block] / profile.baseline.ppl,
            "max_accuracy_drop": profile.sensitivity(c.strategy, "accuracy")[c.block],
        }[budget.kind]
        if spent > budget.value:
            break
        n += 1
    return n


def _impossible(budget: Budget, first: Candidate, verified: Comparison) -> SpdError:
    least = cost(budget, verified)
    return SpdError(
        f"No sync point can be dropped within {describe(budget)}: the best plan found, block {first.block} alone with "
        f"{first.strategy}, costs {describe(budget, least)} on held-out text; raise {OPTIONS[budget.kind]}."
    )
