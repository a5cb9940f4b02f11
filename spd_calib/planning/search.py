"""From a profile to a plan: which sync points to drop, in which way, so that the whole keeps its budget.

KL drives the search, whatever the budget: it is the least noisy measure, and the one with a model for sets
(interactions.py). How far to go, and which of the best few sets it is, is measured on whole plans.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from spd_calib.errors import InputError, SpdError
from spd_calib.formats.common import Strategy
from spd_calib.formats.plan import Budget
from spd_calib.formats.profile import Comparison, Point, Profile

from .budget import METRICS, OPTIONS, check_enough_text, cost, describe, kept, margin, spare
from .interactions import Interactions, Set

Drops = dict[Point, Strategy]  # how each dropped sync point is dropped
Measure = Callable[[Sequence[Drops]], list[Comparison]]  # whole plans
RIVALS = 5  # sets of one size that are measured as wholes


@dataclass(frozen=True)
class Candidate:
    """The one way in which a sync point would be dropped, and why that one."""

    point: Point
    strategy: Strategy
    kl: float
    reason: str

    @property
    def block(self) -> int:
        return self.point.block


@dataclass(frozen=True)
class Choice:
    """The sync points dropped, and what they cost on text that was not used to choose them."""

    dropped: list[Candidate]
    verified: Comparison
    repaired: int  # sync points given back because the held-out text said so
    predicted_kl: float  # by the profile's interactions
    measured: dict[frozenset[Point], Comparison]  # every set measured on the way there, on the calibration text


def candidates(profile: Profile, budget: Budget) -> list[Candidate]:
    """Every sync point with the cheapest strategy it tolerates, least sensitive first by the budget's own ranking.

    The MLP's sync points come with block_drop, where the profile has them and the budget allows it.
    """
    allowed: list[Strategy] = [s for s in (Strategy.PLAIN_DROP, Strategy.BLOCK_DROP) if s in budget.strategies]
    measured = {s: profile.kl(s) for s in allowed}
    if missing := [s for s in allowed if not measured[s] and not (s == Strategy.BLOCK_DROP and profile.kl(s, "mlp"))]:
        raise InputError(
            f"The profile holds no measurement of {missing[0]}; profile again with --strategy {missing[0]}."
        )
    if not allowed:
        raise InputError("--strategy keep_sync alone leaves nothing to plan; allow block_drop or plain_drop.")
    errors = margin(min(text.sequences for text in profile.text.each))
    found = [_cheapest(block, measured, errors) for block in sorted(set().union(*measured.values()))]
    if Strategy.BLOCK_DROP in allowed and budget.kind != "tau":
        found += [
            Candidate(Point(block=block, sync_point="mlp"), Strategy.BLOCK_DROP, kl, "its sync joins the next one kept")
            for block, (kl, _) in profile.kl(Strategy.BLOCK_DROP, "mlp").items()
        ]
    metric = "kl" if profile.fisher else METRICS.get(budget.kind, profile.rank_by)
    value = {
        (kind, s): profile.sensitivity(s, metric, kind)
        for s in allowed
        for kind in profile.sync_points
        if kind == "attention" or s == Strategy.BLOCK_DROP
    }
    return sorted(found, key=lambda c: (value[c.point.sync_point, c.strategy][c.block], c.kl, c.block))


def _cheapest(
    block: int, measured: Mapping[Strategy, dict[int, tuple[float, float | None]]], errors: float
) -> Candidate:
    """plain_drop needs no change to the block, but only where it measures as harmless: no worse than block_drop.

    Worse: by `errors` standard errors, where there are any.
    """
    point = Point(block=block, sync_point="attention")
    if len(measured) == 1:
        strategy = next(iter(measured))
        return Candidate(point, strategy, measured[strategy][block][0], "the only strategy allowed")
    plain, (drop, stderr) = measured[Strategy.PLAIN_DROP][block][0], measured[Strategy.BLOCK_DROP][block]
    if plain <= drop + (0.0 if stderr is None else errors * stderr):
        return Candidate(point, Strategy.PLAIN_DROP, plain, "plain drop measures no worse than block drop")
    return Candidate(point, Strategy.BLOCK_DROP, drop, f"plain drop would cost KL {plain:.3g}")


def interactions_of(profile: Profile, found: Sequence[Candidate]) -> Interactions:
    """The model of what sets of these candidates cost."""
    if profile.fisher is not None:
        return Interactions.of_fisher(profile.fisher).restricted([c.point for c in found])
    base = profile.recovered.alone.kl if profile.recovered else 0.0
    return Interactions.of_singles({c.point: c.kl for c in found}, base)


class Search:
    """Sets of candidates, what the model says they cost, and what was measured of them on the calibration text."""

    def __init__(self, profile: Profile, budget: Budget, calibrate: Measure):
        self.ranked = candidates(profile, budget)
        self.by_point = {c.point: c for c in self.ranked}
        self.model = interactions_of(profile, self.ranked)
        self.front = self.model.front()
        self.calibrate = calibrate
        self.measured: dict[Set, Comparison] = {}
        self.rankings = [self.indices([c.point for c in self.ranked[:n]]) for n in range(len(self.ranked) + 1)]
        attention = [c.point for c in self.ranked if c.point.sync_point == "attention"]
        self.attention = self.indices(attention)
        self.views = [(self.model, self.front, [c.point for c in self.ranked])]  # a model, its front, its points ranked
        if 0 < len(attention) < len(self.ranked):
            without_mlps = self.model.restricted(attention)
            self.views.append((without_mlps, without_mlps.front(), attention))

    def few(self, n: int) -> list[Set]:
        """The sets of n worth measuring: the best few of the model and the profile's ranking, of both kinds of sync
        points and of the attention's alone: so no plan over both is worse than the one over the attention's."""
        sets = []
        for model, front, ranked in self.views:
            if n <= len(ranked):
                sets += [self.indices(model.points_of(s)) for s in model.rivals(front[n], RIVALS)]
                sets.append(self.indices(ranked[:n]))
        return list(dict.fromkeys(sets))

    def measure(self, sets: Sequence[Set]) -> list[Comparison]:
        """On the calibration text, each set once."""
        if new := [s for s in dict.fromkeys(sets) if s not in self.measured]:
            self.measured.update(zip(new, self.calibrate([self.drops(s) for s in new]), strict=True))
        return [self.measured[s] for s in sets]

    def drops(self, chosen: Set) -> Drops:
        return {p: self.by_point[p].strategy for p in self.model.points_of(chosen)}

    def indices(self, points: Sequence[Point]) -> Set:
        return frozenset(self.model.points.index(p) for p in points)

    def choice(self, chosen: Set, verified: Comparison, repaired: int = 0) -> Choice:
        points = self.model.points_of(chosen)
        return Choice(
            dropped=[c for c in self.ranked if c.point in points],
            verified=verified,
            repaired=repaired,
            predicted_kl=self.model.kl(chosen),
            measured={frozenset(self.model.points_of(s)): m for s, m in self.measured.items()},
        )


def choose(
    profile: Profile,
    budget: Budget,
    calibrate: Measure,
    verify: Measure,
    obvious: Callable[[int], Sequence[Sequence[Point]]] = lambda n: (),
    spent: Callable[[], None] = lambda: None,
) -> Choice:
    """Pick sync points for `budget`: `calibrate` measures whole plans on the text of the profile, `verify` on other.

    The largest set of the front that keeps the budget is found by bisection on the calibration text, with some standard
    errors to spare, so that the held-out text need not take part in choosing; of that size the best few are measured,
    and of the next. What is best is verified, and smaller sets are taken while the held-out text says it breaks the
    budget: that text has then taken part in choosing, and `spent` is called, so that `verify` may go on to other.
    `obvious` gives, for a number of drops, sets that are measured with the best few. Raises InputError, before anything
    is measured, where the profile's text is too short, and SpdError, naming the best plan found, where not even one
    sync point can go.
    """
    check_enough_text(budget, profile)
    search = Search(profile, budget, calibrate)
    if budget.kind == "tau":
        chosen = search.indices([c.point for c in search.ranked if tier(profile, budget, c) == "insensitive"])
        return search.choice(chosen, verify([search.drops(chosen)])[0])

    def best(n: int, simple: bool = True) -> Set:
        """Of n sync points, in the budget's own unit; where a number is asked for and tasks ranked, that ranking's.

        MLPs must earn their place, since not every runtime can defer their sync point: where a set without any is not
        worse by more than the standard errors say (`spare`), it is taken (`simple`).
        """
        if n == 0 or (budget.kind == "drop" and _ranked_by_tasks(profile)):
            return search.rankings[n]
        sets = [*search.few(n), *map(search.indices, obvious(n))]
        found = dict(zip(sets, search.measure(sets), strict=True))

        def costs(chosen: Set) -> tuple[float, float]:
            return cost(budget, found[chosen]), found[chosen].kl

        cheapest = min(sets, key=costs)
        if simple and (without := [s for s in sets if s <= search.attention]):
            simplest = min(without, key=costs)
            noise = spare(budget, found[simplest], found[cheapest])
            as_good = cost(budget, found[simplest]) <= cost(budget, found[cheapest]) + noise
            if as_good and kept(budget, found[simplest], certain=True):
                return simplest
        return cheapest

    if budget.kind == "drop":
        chosen = best(int(budget.value) - len(profile.settled))
        return search.choice(chosen, verify([search.drops(chosen)])[0])

    largest = _bisect(search, budget)
    chosen = best(largest)
    while largest < len(search.ranked) and kept(budget, search.measure([larger := best(largest + 1)])[0], certain=True):
        largest, chosen = largest + 1, larger
    n = largest
    while n > 0:
        verified = verify([search.drops(chosen)])[0]
        if kept(budget, verified):
            return search.choice(chosen, verified, largest - n)
        cheapest = best(n, simple=False)  # from here on MLPs are dropped wherever that is cheaper
        if chosen == cheapest:
            n = _smaller(search, budget, chosen, verified)
            cheapest = best(n, simple=False)
        chosen = cheapest
        if n:
            spent()
    least = best(1, simple=False)
    verified = verify([search.drops(least)])[0]
    if largest == 0 and kept(budget, verified):  # too close to say on the calibration text; the other text decides
        return search.choice(least, verified)
    raise _impossible(budget, profile, search.by_point[search.model.points_of(least)[0]], verified)


def _bisect(search: Search, budget: Budget) -> int:
    """The size of the largest set of the front that keeps the budget on the calibration text."""
    low, high = 0, len(search.ranked)  # `low` sync points are known to keep the budget
    middle = low
    if budget.kind == "max_kl":
        middle = sum(search.model.kl(s) <= budget.value for s in search.front[1:])
    middle = min(max(middle, 1), high)
    while low < high:
        if kept(budget, search.measure([search.front[middle]])[0], certain=True):
            low = middle
        else:
            high = middle - 1
        middle = (low + high + 1) // 2
    return low


def _smaller(search: Search, budget: Budget, broken: Set, verified: Comparison) -> int:
    """How many sync points to try next: the held-out text costs more by a ratio now seen: taken to hold for all."""
    calibrated, seen = cost(budget, search.measure([broken])[0]), cost(budget, verified)
    for n in range(len(broken) - 1, 0, -1):
        smaller = search.front[n]
        known = search.measured.get(smaller)
        if known is not None and calibrated > 0:
            expected = cost(budget, known) * seen / calibrated
        else:
            expected = seen * search.model.kl(smaller) / (search.model.kl(broken) or 1)
        if expected <= budget.value:
            return n
    return min(len(broken) - 1, 1)


def tier(profile: Profile, budget: Budget, candidate: Candidate) -> str:
    """The paper's classes, by perplexity sensitivity against tau1 and tau2 (section 4.3)."""
    sensitivity = profile.sensitivity(candidate.strategy, "ppl")[candidate.block]
    if sensitivity <= budget.value:
        return "insensitive"
    return "sensitive" if sensitivity <= (budget.tau2 or budget.value) else "extremely sensitive"


def _ranked_by_tasks(profile: Profile) -> bool:
    return profile.rank_by == "accuracy" and any(m.task_accuracy_drop for m in profile.measurements)


def _impossible(budget: Budget, profile: Profile, first: Candidate, verified: Comparison) -> SpdError:
    least = cost(budget, verified)
    what = "" if first.point.sync_point == "attention" else "'s MLP"
    further = "further " if profile.settled else ""
    return SpdError(
        f"No {further}sync point can be dropped within {describe(budget)}: the best plan found, block {first.block}"
        f"{what} alone with {first.strategy}, costs {describe(budget, least)} on held-out text; raise "
        f"{OPTIONS[budget.kind]}."
    )
