"""From a profile to a plan: which sync points to drop so that the whole keeps its budget.

KL drives the search, whatever the budget: it is the least noisy measure, and the one with a model for sets
(interactions.py), which names the best few sets of every size. How many sync points can go is measured on whole plans,
on the calibration text, from the number that the model expects. Which of the few sets of a size it is, they race for:
all run on a part of that text, the best of them on the whole of it. What was chosen is verified on held-out text, and
made smaller as long as that says that the budget is broken.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from spd_calib.errors import SpdError
from spd_calib.formats.drops import NOTHING_DROPPED, Drops, Point
from spd_calib.formats.plan import Budget
from spd_calib.formats.profile import Comparison, Profile

from .baselines import Baselines
from .budget import check_enough_text, cost, describe, kept, spare
from .candidates import Candidate, candidates, drops_of, interactions_of, tier
from .interactions import Interactions
from .whole_plans import Calibration

Verify = Callable[[Drops, int], Comparison]
"""Measures a plan on held-out text, given how many rounds of it were used up before (whole_plans.HeldOut.verify)."""
RIVALS = 5  # sets of one size that the model names
FINALISTS = 2  # of all sets of one size, measured on the whole calibration text


@dataclass(frozen=True)
class Choice:
    """The sync points to drop, and what they cost on held-out text."""

    drops: Drops
    verified: Comparison
    predicted_kl: float  # by the profile's interactions
    given_back: int  # sync points dropped at first, and kept in the end because held-out text showed the budget broken
    rounds: int  # of held-out text that took part in choosing
    reasons: Mapping[Point, str] = field(default_factory=dict)  # in words, of points treated so for their price


def choose(
    profile: Profile,
    budget: Budget,
    *,
    calibration: Calibration,
    verify: Verify,
    baselines: Baselines | None = None,
    at_least: int = 1,
) -> Choice:
    """Choose the sync points to drop within `budget`, `at_least` 1; or 0 where others, with heads replicated, are.

    Whole plans are measured on the `calibration` text, which a plan must keep its budget on with some standard errors
    to spare: held-out text then seldom takes part in choosing. Where `verify` finds the budget broken all the same, a
    smaller plan is verified on the next round of that text. The sets of `baselines` are tried with those of the search.

    Raises InputError, before anything is measured, where the profile's text is too short, and SpdError, naming the best
    plan found, where not even `at_least` can go.
    """
    check_enough_text(budget, profile)
    search = Search(profile, budget, calibration=calibration, baselines=baselines)
    drops = first = search.first_choice(at_least)
    rounds = 0
    while not kept(budget, verified := verify(drops, rounds)):
        smaller = search.next_choice(drops, verified) if drops else drops
        if not drops or len(smaller) < at_least:
            raise _impossible(profile, budget, drops=drops, verified=verified)
        drops, rounds = smaller, rounds + 1
    return Choice(drops, verified, search.model.kl(drops), given_back=len(first) - len(drops), rounds=rounds)


class Search:
    """Searches the sets of sync points: a model of the profile proposes them, the calibration text decides.

    Of n sync points, front[n] is the cheapest set by the model, ranking[n] the n least sensitive by the profile, few(n)
    the sets that race, finalists(n) those of them that are measured on the whole text, cheapest(n) the cheapest of
    these, and best(n) that or one without MLPs that is as good.
    """

    def __init__(
        self, profile: Profile, budget: Budget, *, calibration: Calibration, baselines: Baselines | None = None
    ):
        self.profile, self.budget, self.calibration, self.baselines = profile, budget, calibration, baselines
        self.ranked = candidates(profile, budget)
        self.model = interactions_of(profile, self.ranked)
        self.spaces = [SearchSpace.of(self.model, self.ranked)]
        attention = [c for c in self.ranked if c.point.sync_point == "attention"]
        if 0 < len(attention) < len(self.ranked):
            self.spaces.append(SearchSpace.of(self.model.restricted(c.point for c in attention), attention))

    @property
    def front(self) -> list[Drops]:
        """Return the cheapest set of every size by the model, from none to all."""
        return self.spaces[0].front

    @property
    def ranking(self) -> list[Drops]:
        """Return the least sensitive sync points, from none to all."""
        return self.spaces[0].ranking

    def first_choice(self, at_least: int) -> Drops:
        """Return the drops to verify first, `at_least` so many, by the calibration text alone."""
        if self.budget.kind == "tau":
            return drops_of([c for c in self.ranked if tier(self.profile, self.budget, c) == "insensitive"])
        if self.budget.kind == "drop":
            return self.best(int(self.budget.value) - len(self.profile.settled))
        largest = self.largest_kept()
        # a single one may be too close to its budget to tell here: held-out text decides
        return largest or self.cheapest(at_least)

    def largest_kept(self) -> Drops:
        """Return the largest set found that keeps the budget: of the size that bisection finds, or of more points."""
        n = self._bisect()
        found = None
        while n < len(self.ranked) and self._may_keep(n + 1) and self._keeps_budget(larger := self.best(n + 1)):
            n, found = n + 1, larger
        return found or self.best(n)

    def _bisect(self) -> int:
        """Return the size of the largest set of the front that keeps the budget.

        The sizes to be measured are those that the model expects, corrected by what was measured last; from the fourth
        on, halves.
        """
        low, high = 0, len(self.ranked)  # `low` sync points are known to keep it
        scale, believed = 1.0, 3  # of what the model expects; how often it is relied on
        while low < high:
            n = self._expected_size(scale) if believed > 0 else (low + high + 1) // 2
            n = min(max(n, low + 1), high)
            low, high = (n, high) if self._keeps_budget(self.front[n]) else (low, n - 1)
            needed = self._cost(self.front[n])[0] + spare(self.budget, self.calibration.cost_of(self.front[n]))
            scale, believed = needed / (self._expected(self.front[n]) or 1), believed - 1
        return low

    def _expected_size(self, scale: float) -> int:
        """Return the largest size whose set is expected to keep the budget, if sets cost `scale` times the expected."""
        fitting = (n for n, drops in enumerate(self.front) if scale * self._expected(drops) <= self.budget.value)
        return max(fitting, default=0)

    def _expected(self, drops: Drops) -> float:
        """Return what a set costs by the model, up to a scale: KL, or its root where the budget is no mean."""
        kl = max(self.model.kl(drops), 0.0)
        return math.sqrt(kl) if self.budget.kind == "max_logprob_diff" else kl

    def best(self, n: int) -> Drops:
        """Return the n sync points to drop: the cheapest set, but without MLPs where that is as good.

        MLPs must earn their place, since not every runtime can defer their sync point: a set without any is taken where
        it is not worse by more than the standard errors say (`spare`). A number of drops, from a profile ranked by
        lm-eval tasks, is taken by that ranking.
        """
        if n == 0 or (self.budget.kind == "drop" and _ranked_by_tasks(self.profile)):
            return self.ranking[n]
        sets = self.finalists(n)
        cheapest = min(sets, key=self._cost)
        simplest = min((d for d in sets if not d.requires_mlp_drop), key=self._cost, default=cheapest)
        noise = spare(self.budget, *(self.calibration.cost_of(drops) for drops in (simplest, cheapest)))
        as_good = self._cost(simplest)[0] <= self._cost(cheapest)[0] + noise
        return simplest if as_good and self._keeps_budget(simplest) else cheapest

    def cheapest(self, n: int) -> Drops:
        """Return the cheapest finalist of n as measured, in the budget's own unit; ties fall to the lower KL."""
        return min(self.finalists(n), key=self._cost) if n else NOTHING_DROPPED

    def few(self, n: int) -> list[Drops]:
        """Return the few sets of n that are worth running.

        They are the model's best and the profile's ranking, of both kinds of sync points and of the attentions' alone
        (so that no plan over both is worse than the one over the attentions').
        """
        return list(dict.fromkeys(drops for space in self.spaces for drops in space.few(n)))

    def finalists(self, n: int) -> list[Drops]:
        """Return the sets of n worth measuring on the whole of the calibration text, which is done here.

        They are the cheapest of the few on a part of it, by KL, the cheapest without MLPs, and the baselines.
        """
        sets = self.few(n)
        if len(sets) > FINALISTS:
            raced = self.calibration.measure_on_part(sets)
            sets.sort(key=lambda drops: raced[drops].kl)
        found = sets[:FINALISTS] + [drops for drops in sets if not drops.requires_mlp_drop][:1]
        if self.baselines is not None:
            found += self.baselines.of_size(n).values()
        self.calibration.measure(found)
        return list(dict.fromkeys(found))

    def _may_keep(self, n: int) -> bool:
        """Say whether a part of the text leaves it open that one of the few sets of n keeps the budget."""
        if self.budget.tasks or self.baselines is not None:
            return True
        raced = self.calibration.measure_on_part(self.few(n))
        return any(cost(self.budget, m) - spare(self.budget, m) <= self.budget.value for m in raced.values())

    def next_choice(self, broken: Drops, verified: Comparison) -> Drops:
        """Return what to try where held-out text shows that `broken` breaks the budget; nothing where nothing is left.

        That is the cheapest set of the same size, MLPs or not, then those of smaller sizes: of the largest that is
        expected to keep the budget, by the model and by the calibration text, if both are as wrong about it as about
        `broken`; or of 1.
        """
        cheapest = self.cheapest(len(broken))
        if cheapest != broken:
            return cheapest
        calibrated, held_out = self._cost(broken)[0], cost(self.budget, verified)
        largest = min(self._expected_size(held_out / (self._expected(broken) or 1)), len(broken) - 1)
        for n in range(largest, 1, -1):
            smaller = self.cheapest(n)
            if calibrated <= 0 or self._cost(smaller)[0] * held_out <= self.budget.value * calibrated:
                return smaller
        return self.cheapest(min(len(broken) - 1, 1))

    def _cost(self, drops: Drops) -> tuple[float, float]:
        """Return what a set costs on the calibration text: in the budget's own unit, and as KL."""
        measured = self.calibration.cost_of(drops)
        return cost(self.budget, measured), measured.kl

    def _keeps_budget(self, drops: Drops) -> bool:
        return kept(self.budget, self.calibration.cost_of(drops), certain=True)


@dataclass(frozen=True)
class SearchSpace:
    """Sync points that the search may choose among: for every size the model's best set and the profile's ranking."""

    model: Interactions
    front: list[Drops]  # the cheapest set of every size by the model, from none to all
    ranking: list[Drops]  # the least sensitive sync points, from none to all

    @classmethod
    def of(cls, model: Interactions, ranked: Sequence[Candidate]) -> "SearchSpace":
        """Return the space of the sync points that `model` knows, which `ranked` holds least sensitive first."""
        return cls(model, model.front(), [drops_of(ranked[:n]) for n in range(len(ranked) + 1)])

    def few(self, n: int) -> list[Drops]:
        """Return the model's best few sets of n sync points, and the n least sensitive; [] if there are fewer."""
        if n >= len(self.ranking):
            return []
        return [*self.model.rivals(self.front[n], count=RIVALS), self.ranking[n]]


def _ranked_by_tasks(profile: Profile) -> bool:
    return profile.rank_by == "accuracy" and any(m.task_accuracy_drop for m in profile.measurements)


def _impossible(profile: Profile, budget: Budget, *, drops: Drops, verified: Comparison) -> SpdError:
    if not drops:  # blocks with heads replicated are dropped in any case
        return SpdError(
            f"No plan with heads replicated is within {describe(budget)}: the blocks that have them cost "
            f"{describe(budget, cost(budget, verified))} on held-out text, nothing else dropped; raise "
            f"`{budget.kind}`, or leave `replicate` out."
        )
    (point,) = drops  # the search gives up at a single one only
    whose = f"block {point.block}" if point.sync_point == "attention" else f"block {point.block}'s MLP"
    return SpdError(
        f"No {'further ' if profile.settled else ''}sync point can be dropped within {describe(budget)}: the best plan "
        f"found, {whose} alone with {drops.strategy(point)}, costs {describe(budget, cost(budget, verified))} on "
        f"held-out text; raise `{budget.kind}`."
    )
