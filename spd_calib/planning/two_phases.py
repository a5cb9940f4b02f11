"""Choosing one choice for prefill and one for decoding, where a whole request is what counts.

Single choices come from the profile: the cheapest set of some sizes, each with the other syncs as they are or with
fewer bits. What a choice costs in one phase alone is measured as it is served, on a part of the calibration text; what
a pair costs is taken to be the sum of both until it is measured itself, on the whole of that text. The best pair is
held against the best single choice, and is taken only where it saves WORTH of the request's time beside it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from spd_calib.errors import SpdError
from spd_calib.formats.drops import NOTHING_DROPPED, Drops, Point
from spd_calib.formats.phases import NOTHING_DROPPED_IN_BOTH, ByPhase, Phase
from spd_calib.formats.plan import Budget, Request
from spd_calib.formats.profile import Comparison, Profile

from .budget import check_enough_text, cost, describe, kept, spare
from .candidates import candidates, interactions_of
from .latency import LatencyModel
from .sync_bits import every_sync, in_words

WORTH = 0.02  # of a request's time, the least that a second choice must save
SIZES = 12  # steps from no drop to all of them
FINALISTS = 4  # pairs that save enough time, measured on the whole calibration text
STRICTER = 0.95  # of what a pair was expected to cost that proved too much, the most that the next one may

Measure = Callable[[Sequence[ByPhase]], list[Comparison]]


@dataclass(frozen=True)
class RequestModel:
    """Says how long a request takes: one step reads its prompt and gives the first of `new_tokens`, then one each."""

    models: Mapping[Phase, LatencyModel]
    new_tokens: int

    def seconds(self, plan: ByPhase) -> float:
        """Return the seconds of a request under a plan."""
        prefill, decode = (
            self.models[phase].seconds(len(plan.at(phase)), plan.at(phase).counted_bits)
            for phase in ("prefill", "decode")
        )
        return prefill + (self.new_tokens - 1) * decode

    def saved(self, plan: ByPhase) -> float:
        """Return the share of a dense request's time that a plan saves."""
        return 1 - self.seconds(plan) / self.seconds(NOTHING_DROPPED_IN_BOTH)

    def request(self, plan: ByPhase, *, one: ByPhase, two: ByPhase) -> Request:
        """Return what stands in the file of a `plan`: the best single choice, `one`, beside the best pair, `two`."""
        step = self.models["prefill"].step
        return Request(
            hardware=self.models["prefill"].hardware,
            batch=step.batch,
            prompt=step.context,
            new_tokens=self.new_tokens,
            dense_seconds=self.seconds(NOTHING_DROPPED_IN_BOTH),
            one_choice_seconds=self.seconds(one),
            two_choices_seconds=self.seconds(two),
            planned_seconds=self.seconds(plan),
            saved=self.saved(plan),
        )


@dataclass(frozen=True)
class ChosenByPhase:
    """A plan in one choice or two, what it costs on held-out text, and what it was held against.

    `one` is the best single choice, `two` the best pair; `rounds` of held-out text took part in choosing.
    """

    plan: ByPhase
    one: ByPhase
    two: ByPhase
    verified: Comparison
    predicted_kl: float
    rounds: int


def single_choices(profile: Profile, budget: Budget, *, bits: Sequence[int | None], num_blocks: int) -> list[Drops]:
    """Return the choices that pairs are made of, no drop among them: some sizes of the front, the other syncs as given.

    Of `bits` each is a number that all syncs have that are kept; None stands for syncs as they are.
    """
    front = interactions_of(profile, candidates(profile, budget)).front()
    sizes = sorted({round(i * (len(front) - 1) / SIZES) for i in range(SIZES + 1)})
    others = [every_sync(n, num_blocks) for n in bits]
    return list(dict.fromkeys([NOTHING_DROPPED, *(quantised | front[n] for quantised in others for n in sizes)]))


def choose_by_phase(
    profile: Profile,
    budget: Budget,
    choices: Sequence[Drops],
    request: RequestModel,
    *,
    measure: Measure,
    race: Measure,
    verify: Callable[[ByPhase, int], Comparison],
) -> ChosenByPhase:
    """Choose a plan in one choice or two for a request, within a KL or with a share of its time to save.

    `measure` measures plans on the calibration text as they are served, `race` on a part of it, `verify` one on
    held-out text, after so many rounds of it were used up. Raises InputError where the profile's text is too short, and
    SpdError where the budget cannot be met.
    """
    check_enough_text(budget, profile)
    search = _Search(budget, request, _additive(choices, race), measure=measure)
    rounds, stricter = 0, 1.0
    while True:
        plan, one, two = search.choose(stricter)
        verified = verify(plan, rounds)
        if budget.kind == "min_speedup" or kept(budget, verified):
            return ChosenByPhase(plan, one, two, verified, search.expected[plan], rounds)
        stricter *= min(STRICTER, budget.value / cost(budget, verified))
        rounds += 1


def _additive(choices: Sequence[Drops], race: Measure) -> dict[ByPhase, float]:
    """Return what each pair is expected to cost: what each choice costs alone, the other phase dropping nothing."""
    in_prefill = [ByPhase(drops, NOTHING_DROPPED) for drops in choices]
    in_decode = [ByPhase(NOTHING_DROPPED, drops) for drops in choices]
    alone = [measured.kl for measured in race([*in_prefill, *in_decode])]
    of_prefill, of_decode = alone[: len(choices)], alone[len(choices) :]
    return {
        ByPhase(prefill, decode): a + b
        for prefill, a in zip(choices, of_prefill, strict=True)
        for decode, b in zip(choices, of_decode, strict=True)
    }


class _Search:
    """Searches pairs of choices, `expected` to cost so much; what was measured of them is held."""

    def __init__(self, budget: Budget, request: RequestModel, expected: Mapping[ByPhase, float], *, measure: Measure):
        self.budget, self.request, self.expected, self._measure = budget, request, expected, measure
        self.seconds = {plan: request.seconds(plan) for plan in expected}
        self.singles = [plan for plan in expected if plan.one_choice]
        self._measured: dict[ByPhase, Comparison] = {}

    def choose(self, stricter: float) -> tuple[ByPhase, ByPhase, ByPhase]:
        """Return the plan to verify, the best single choice and the best pair, within `stricter` times the budget.

        Raises SpdError where no plan is worth it.
        """
        if self.budget.kind == "min_speedup":
            return self._reaching_speedup()
        budget = self.budget.model_copy(update={"value": stricter * self.budget.value})
        one, two = (self._fastest_within(budget, plans) for plans in (self.singles, list(self.expected)))
        two = min(one, two, key=self.seconds.__getitem__)
        plan = two if self._worth(two, beside=one) else one
        if plan == NOTHING_DROPPED_IN_BOTH:
            raise SpdError(
                f"Within {describe(self.budget)} neither one choice for both phases nor a pair of them saves "
                f"{100 * WORTH:.0f} % of the request's time; raise `{self.budget.kind}`."
            )
        return plan, one, two

    def _fastest_first(self, plan: ByPhase) -> tuple[float, int, float]:
        """Return what plans are sorted by: where none is faster, fewer bits must not be taken for nothing."""
        return self.seconds[plan], len(plan.prefill.bits) + len(plan.decode.bits), self.expected[plan]

    def _worth(self, two: ByPhase, *, beside: ByPhase) -> bool:
        return 1 - self.seconds[two] / self.seconds[beside] >= WORTH

    def cost_of(self, plan: ByPhase) -> Comparison:
        """Return what one plan costs on the whole calibration text; each is measured once."""
        self.measure([plan])
        return self._measured[plan]

    def measure(self, plans: Iterable[ByPhase]) -> None:
        """Measure those of `plans` that were not measured yet."""
        if new := [plan for plan in plans if plan not in self._measured]:
            self._measured.update(zip(new, self._measure(new), strict=True))

    def _fastest_within(self, budget: Budget, plans: Sequence[ByPhase], *, certain: bool = True) -> ByPhase:
        """Return the fastest of `plans` found that keeps the budget on the calibration text, to spare where `certain`.

        The fastest that is expected to keep it is measured; what it shows corrects what is expected of the others.
        """
        scale = 1.0
        for plan in sorted(plans, key=self._fastest_first):
            if scale * self.expected[plan] > budget.value:
                continue
            measured = self.cost_of(plan)
            if kept(budget, measured, certain=certain):
                return plan
            needed = measured.kl + (spare(budget, measured) if certain else 0.0)
            scale = max(needed, budget.value) / STRICTER / (self.expected[plan] or budget.value)
        return NOTHING_DROPPED_IN_BOTH

    def _reaching_speedup(self) -> tuple[ByPhase, ByPhase, ByPhase]:
        """Return the cheapest plan that saves enough of a request's time, the cheapest single choice that does, and the
        fastest pair of no more KL than that.
        """
        most = (1 - self.budget.value) * self.request.seconds(NOTHING_DROPPED_IN_BOTH) * (1 + 1e-9)
        reaching = [plan for plan in self.expected if self.seconds[plan] <= most]
        if not reaching:
            fastest = min(self.expected, key=self.seconds.__getitem__)
            raise SpdError(
                f"`min_speedup` {100 * self.budget.value:.3g}% is beyond what can be saved of this request: the "
                f"fastest pair of choices saves {100 * self.request.saved(fastest):.3g} %; ask for less."
            )
        two = self._cheapest(reaching)
        singles = [plan for plan in reaching if plan.one_choice]
        if not singles:
            return two, min(self.singles, key=self.seconds.__getitem__), two
        one = self._cheapest(singles)
        two = min(one, two, key=lambda plan: self.cost_of(plan).kl)
        as_cheap = self.budget.model_copy(update={"kind": "max_kl", "value": self.cost_of(one).kl})
        fastest = self._fastest_within(as_cheap, list(self.expected), certain=False)
        fastest = min(one, fastest, key=self.seconds.__getitem__)
        return (two if self._worth(fastest, beside=one) else one), one, fastest

    def _cheapest(self, plans: Sequence[ByPhase]) -> ByPhase:
        """Return the plan of the least KL as measured, among the few that are expected to cost least."""
        few = sorted(plans, key=lambda plan: (self.expected[plan], self.seconds[plan]))[:FINALISTS]
        self.measure(few)
        return min(few, key=lambda plan: self.cost_of(plan).kl)


def reasons_of(plan: ByPhase, request: RequestModel) -> dict[Point, str]:
    """Return in words how each phase treats the sync points that are not simply kept, and what that takes there."""
    found = {}
    for point in sorted({*plan.prefill.by_point, *plan.decode.by_point}):
        prefill, decode = plan.prefill.at(point), plan.decode.at(point)
        if prefill == decode:
            found[point] = f"{in_words(prefill)} in both phases"
            continue
        times = {
            phase: f"{1e6 * model.of(plan.at(phase).at(point)):.1f} us of {1e6 * model.all_reduce:.1f}"
            for phase, model in request.models.items()
        }
        found[point] = (
            f"{in_words(prefill)} in prefill, {times['prefill']}; {in_words(decode)} in decoding, {times['decode']}"
        )
    return found
