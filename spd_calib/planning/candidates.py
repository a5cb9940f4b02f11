"""The sync points that a budget lets go, each in the one way in which it would be dropped."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spd_calib.errors import InputError
from spd_calib.formats.drops import Drops, Point, Strategy
from spd_calib.formats.plan import Budget
from spd_calib.formats.profile import Cost, Profile

from .budget import FEWEST_TO_CHOOSE, MARGIN
from .interactions import Interactions

RANKED_BY: dict[str, Cost] = {  # kind of budget -> what sync points are ranked by; for other kinds: profile.rank_by
    "max_kl": "kl",
    "max_ppl_increase": "ppl",
    "max_accuracy_drop": "top1_accuracy",
    "max_logprob_diff": "kl",
    "tau": "ppl",
}


@dataclass(frozen=True)
class Candidate:
    """A sync point with the strategy it would be dropped by, what that alone costs (KL), and the reason."""

    point: Point
    strategy: Strategy
    kl: float
    reason: str


def candidates(profile: Profile, budget: Budget) -> list[Candidate]:
    """Return every sync point with the strategy it would be dropped by, ranked by the budget: least sensitive first.

    The MLPs' sync points come with block_drop, where the profile has them and the budget allows it; the paper's rule
    (tau) knows the attentions' alone. Raises InputError where no strategy is allowed, or one was not profiled.
    """
    allowed: list[Strategy] = [s for s in (Strategy.PLAIN_DROP, Strategy.BLOCK_DROP) if s in budget.strategies]
    measured = {s: profile.kl(s) for s in allowed}
    if missing := [s for s in allowed if not measured[s] and not (s == Strategy.BLOCK_DROP and profile.kl(s, "mlp"))]:
        raise InputError(
            f"The profile holds no measurement of {missing[0]}; profile again with the strategy {missing[0]}."
        )
    if not allowed:
        raise InputError("The strategy keep_sync alone leaves nothing to plan; allow block_drop or plain_drop.")
    few = min(text.sequences for text in profile.text.each) < FEWEST_TO_CHOOSE
    errors = 0.0 if few else MARGIN
    found = [_of_attention(block, measured, errors=errors) for block in sorted(set().union(*measured.values()))]
    if Strategy.BLOCK_DROP in allowed and budget.kind != "tau":
        found += [
            Candidate(Point(block, "mlp"), Strategy.BLOCK_DROP, kl, "its sync joins the next one kept")
            for block, (kl, _) in profile.kl(Strategy.BLOCK_DROP, "mlp").items()
        ]
    metric: Cost = RANKED_BY.get(budget.kind, profile.rank_by)
    if budget.tasks:
        metric = "accuracy"
    if profile.fisher:
        metric = "kl"
    value = {
        (sublayer, s): profile.sensitivity(s, metric, sublayer)
        for s in allowed
        for sublayer in profile.sync_points
        if sublayer == "attention" or s == Strategy.BLOCK_DROP
    }
    return sorted(found, key=lambda c: (value[c.point.sync_point, c.strategy][c.point.block], c.kl, c.point.block))


def _of_attention(
    block: int, measured: Mapping[Strategy, dict[int, tuple[float, float | None]]], *, errors: float
) -> Candidate:
    """Return plain_drop where it measures no worse, as it needs no change to the block; else block_drop.

    Worse means by more than `errors` standard errors, none of them where there are too few sequences to rely on one.
    """
    point = Point(block, "attention")
    if len(measured) == 1:
        strategy = next(iter(measured))
        return Candidate(point, strategy, measured[strategy][block][0], "the only strategy allowed")
    plain, (drop, stderr) = measured[Strategy.PLAIN_DROP][block][0], measured[Strategy.BLOCK_DROP][block]
    if plain <= drop + (0.0 if stderr is None else errors * stderr):
        return Candidate(point, Strategy.PLAIN_DROP, plain, "plain drop measures no worse than block drop")
    return Candidate(point, Strategy.BLOCK_DROP, drop, f"plain drop would cost KL {plain:.3g}")


def drops_of(found: Sequence[Candidate]) -> Drops:
    """Return what dropping all of these candidates is."""
    return Drops.of({c.point: c.strategy for c in found})


def interactions_of(profile: Profile, found: Sequence[Candidate]) -> Interactions:
    """Return the model of what sets of these candidates cost."""
    if profile.fisher is not None:
        return Interactions.of_fisher(profile.fisher).restricted(c.point for c in found)
    base = profile.recovered.alone.kl if profile.recovered else 0.0
    return Interactions.of_singles(drops_of(found), {c.point: c.kl for c in found}, base=base)


def tier(profile: Profile, budget: Budget, candidate: Candidate) -> str:
    """Return the paper's class of a candidate, by its perplexity sensitivity against tau1 and tau2 (section 4.3)."""
    sensitivity = profile.sensitivity(candidate.strategy, "ppl")[candidate.point.block]
    if sensitivity <= budget.value:
        return "insensitive"
    return "sensitive" if sensitivity <= (budget.tau2 or budget.value) else "extremely sensitive"
