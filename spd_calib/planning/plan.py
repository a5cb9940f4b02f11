"""The plan file: what was chosen, why, what was predicted, and what the whole measures on held-out text."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

from spd_calib.formats.common import Provenance, Strategy, TextRef
from spd_calib.formats.plan import Budget, CompensationFile, Plan, PlannedBlock, Predicted, Verified
from spd_calib.formats.profile import Comparison, Point, Profile
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.sensitivity.averaging import average
from spd_calib.sensitivity.measure import Experiment, Tick, measure

from .obvious import back_to_front_sets, obvious_sets, paper_order
from .search import Candidate, Choice, Drops, candidates, choose, tier

Sequences = Sequence[Sequence[int]]
TaskLoss = Callable[[], tuple[dict[str, float], dict[str, float]]]  # by task: accuracy lost, and its standard error
RECOVERY: dict[str, Literal["distillation", "grouping+distillation"]] = {
    "sensitive": "distillation",
    "extremely sensitive": "grouping+distillation",
}


class HeldOutText(NamedTuple):
    """Token ids to verify on, of each of the profile's texts, and what names them in a file."""

    texts: Sequence[Sequences]
    ref: TextRef


def make_plan(
    lm: TensorParallelLM,
    profile: Profile,
    budget: Budget,
    texts: Sequence[Sequences],
    held_out: HeldOutText,
    provenance: Provenance,
    batch_size: int = 8,
    tick: Tick = lambda experiment, tally: None,
    compare: bool = False,
    recovered: Plan | None = None,
    recovered_from: TensorParallelLM | None = None,
    compensation: CompensationFile | None = None,
    tasks: tuple[TaskLoss, TaskLoss] | None = None,
    expect: Callable[[int], None] = lambda ticks: None,
    further: Callable[[int], HeldOutText | None] = lambda times: None,
) -> tuple[Plan, Choice, dict[str, Comparison]]:
    """Choose, verify and, where needed, repair. Raises SpdError where the budget cannot be met.

    `texts`: token ids to choose by, of each of the profile's texts; `held_out`: to verify on. What is measured is their
    mean. `further` gives, by its number, another lot to verify on, for a plan that was repaired because an earlier one
    said so; None where there is no more: then the same text verifies again, and the plan says so.
    With `compare` the obvious sets of the same size are measured, too, and may be chosen; the third value holds what
    they and the plan cost on the calibration text, by name. Of a profile of a recovered checkpoint: `recovered` is the
    checkpoint's plan, `recovered_from` the dense model it was made from, `compensation` the predictors beside the plan.
    A budget of lm-eval tasks needs `tasks`: what `lm`, as it is set, loses on documents to choose by, and on others.
    `expect` is told of every `tick` to come, as soon as it is known.
    """

    def measured_on(which: Sequence[Sequences], task_loss: TaskLoss | None):
        def measured(sets: Sequence[Drops]) -> list[Comparison]:
            expect(len(sets) * sum(math.ceil(len(sequences) / batch_size) for sequences in which))
            each = [measure_sets(lm, sets, sequences, batch_size, tick, recovered_from) for sequences in which]
            found = list(map(average, zip(*each, strict=True)))
            return found if task_loss is None else list(map(partial(_with_tasks, lm, task_loss), sets, found))

        return measured

    lots, seen = [held_out], False

    def verify(sets: Sequence[Drops]) -> list[Comparison]:
        return measured_on(lots[-1].texts, tasks[1] if tasks else None)(sets)

    def spent() -> None:
        nonlocal seen
        fresh = further(len(lots))
        lots.extend([fresh] if fresh else [])
        seen = fresh is None or tasks is not None

    calibrate = measured_on(texts, tasks[0] if tasks else None)
    named = Obvious(candidates(profile, budget), calibrate) if compare else None
    obvious = (lambda n: list(named(n).values())) if named else (lambda n: [])
    choice = choose(profile, budget, calibrate, verify, obvious, spent)
    blocks = _blocks(lm.module_paths, profile, budget, choice, recovered)
    mlp_drop = any(b.mlp_strategy != Strategy.KEEP_SYNC for b in blocks)
    plan = Plan(
        model=profile.model,
        tensor_parallel=profile.tensor_parallel,
        requires=[*(["mlp_drop"] if mlp_drop else []), *(["compensation"] if compensation else [])],  # type: ignore[list-item]
        compensation=compensation,
        recovered_from=recovered.recovered_from if recovered else None,
        blocks=blocks,
        budget=budget,
        predicted=_predicted(profile, choice),
        verified=Verified(**vars(choice.verified), text=lots[-1].ref, seen=seen, lot=len(lots) - 1),
        provenance=provenance,
    )
    return plan, choice, named.compare(choice) if named else {}


def measure_sets(
    lm: TensorParallelLM,
    sets: Sequence[Drops],
    sequences: Sequence[Sequence[int]],
    batch_size: int,
    tick: Tick,
    dense: TensorParallelLM | None = None,
) -> list[Comparison]:
    """Whole sets of drops against the dense model."""
    experiments = [Experiment.of(drops, lm.num_blocks) for drops in sets]
    return measure(lm, sequences, experiments, batch_size, tick, dense=dense)[1]


def _with_tasks(lm: TensorParallelLM, task_loss: TaskLoss, drops: Drops, measured: Comparison) -> Comparison:
    experiment = Experiment.of(drops, lm.num_blocks)
    lm.set_strategies(experiment.attention, experiment.mlp)
    lost, stderr = task_loss()
    lm.keep_all()
    return measured.model_copy(update={"task_accuracy_drop": lost, "task_accuracy_drop_stderr": stderr})


class Obvious:
    """The obvious sets of n of the candidates, by name; the paper's order is measured once it is asked for."""

    def __init__(self, found: Sequence[Candidate], calibrate):
        self.strategies = {c.point: c.strategy for c in found}
        self.calibrate = calibrate
        self.order: list[Point] | None = None

    def __call__(self, n: int) -> dict[str, list[Point]]:
        if self.order is None:
            attention = sorted((p for p in self.strategies if p.sync_point == "attention"), key=lambda p: p.block)
            cumulative = self.calibrate(back_to_front_sets(attention, self.strategies))
            self.order = paper_order(attention, cumulative)
        return obvious_sets(list(self.strategies), n, self.order)

    def compare(self, choice: Choice) -> dict[str, Comparison]:
        """The plan and the obvious sets of its size on the calibration text; what was measured before is not again."""
        chosen = [c.point for c in choice.dropped]
        sets = {"this plan": chosen, **self(len(chosen))} if chosen else {}
        unknown = [points for points in sets.values() if frozenset(points) not in choice.measured]
        new = self.calibrate([{p: self.strategies[p] for p in points} for points in unknown]) if unknown else []
        known = {**choice.measured, **dict(zip(map(frozenset, unknown), new, strict=True))}
        return {name: known[frozenset(points)] for name, points in sets.items()}


def _blocks(
    modules: Sequence[str], profile: Profile, budget: Budget, choice: Choice, recovered: Plan | None
) -> list[PlannedBlock]:
    by_point = {c.point: c for c in candidates(profile, budget)}
    chosen = {c.point for c in choice.dropped}
    blocks = []
    for index, module in enumerate(modules):
        attention = by_point.get(Point(block=index, sync_point="attention"))
        mlp = by_point.get(Point(block=index, sync_point="mlp"))
        before = recovered.blocks[index] if recovered else None
        kept = (before.strategy, before.mlp_strategy) if before else (Strategy.KEEP_SYNC, Strategy.KEEP_SYNC)
        recovery = None
        reasons = [before.reason] if before and any(s != Strategy.KEEP_SYNC for s in kept) else []
        for c in (attention, mlp):
            if c is None:
                continue
            prefix = "" if c is attention else "MLP: "
            if c.point in chosen:
                reasons.append(f"{prefix}{c.reason}")
            elif budget.kind == "tau":
                recovery = RECOVERY[tier(profile, budget, c)]
                reasons.append(f"{tier(profile, budget, c)}: kept until `spd-calib recover` treats it ({recovery})")
            else:
                reasons.append(f"{prefix}{c.strategy} costs KL {c.kl:.3g}, beyond the budget")
        blocks.append(
            PlannedBlock(
                index=index,
                module=module,
                strategy=attention.strategy if attention and attention.point in chosen else kept[0],
                mlp_strategy=Strategy.BLOCK_DROP if mlp and mlp.point in chosen else kept[1],
                recovery=recovery,
                compensation=before.compensation if before else None,
                kl=attention.kl if attention else None,
                mlp_kl=mlp.kl if mlp else None,
                reason="; ".join(reasons) or "not profiled",
            )
        )
    return blocks


def _predicted(profile: Profile, choice: Choice) -> Predicted:
    if profile.fisher is not None:
        return Predicted(kl=choice.predicted_kl)

    def total(metric) -> float:
        values = [(profile.sensitivity(c.strategy, metric, c.point.sync_point), c.block) for c in choice.dropped]
        return sum(value[block] for value, block in values)

    ppl, accuracy = total("ppl") / profile.baseline.ppl, total("accuracy")
    if alone := profile.recovered and profile.recovered.alone:
        ppl, accuracy = ppl + alone.ppl_increase, accuracy + alone.accuracy_drop
    return Predicted(kl=choice.predicted_kl, ppl_increase=ppl, accuracy_drop=accuracy)
