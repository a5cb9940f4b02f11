"""Treating the blocks of a plan: what is tried, in which order, and what is kept.

Without training, block after block in one pass over the text: a treatment stays where the error at its block's output
falls (closed_form.py). Then, never worse: all of that, and each training, stays only where the KL of the whole plan, on
text that nothing was fitted on, falls by more than the standard error of that fall. Where heads are replicated
afterwards (replicate.py), there is a second pass. Everything tried stands in the report.
"""

import bisect
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from spd_calib.errors import InputError
from spd_calib.formats.common import Tier
from spd_calib.formats.drops import Strategy
from spd_calib.formats.plan import Budget
from spd_calib.parallel.comm import Comm, SimulatedComm
from spd_calib.planning.replication import Affordable

from .closed_form import COST_TOKENS, ClosedForm, treat_block
from .distillation import distil_block, distil_together
from .error_cost import ErrorCost, error_costs, fits_in_memory
from .feed import Feed
from .finished import FinishedSteps
from .give_back import give_back, replace_blocks, with_dense_weights
from .held_out import HeldOut
from .journal import TensorJournal
from .judge import Judge
from .options import RecoveryOptions
from .planned_model import PlannedModel
from .replicate import with_every_head, worth_replicating
from .report import TOGETHER, RecoveryReport
from .student import Student

AHEAD = 2.0  # what fitting and training what is left wins at most behind a refit, on real models (results/llm)
Sequences = Sequence[Sequence[int]]


def recover(
    model: PlannedModel,
    *,
    fitting: Sequences,
    held_out: Sequences,
    tiers: Mapping[int, Tier],
    options: RecoveryOptions = RecoveryOptions(),
    heads: Affordable | None = None,
    budget: Budget | None = None,
    journal: TensorJournal | None = None,
    tick: Callable[[str], None] | None = None,
    replicas: Comm | None = None,
) -> RecoveryReport:
    """Treat the dropped blocks of `model` by their tiers; its students are then what was kept.

    With `heads` all KV groups of other ranks are replicated in as many blocks as that says, where the recovered model
    wins most by it (replicate.py). With a `budget` as few blocks as must be are given back to the dense model until the
    whole keeps it: in the end, and, with refit among the methods, until it keeps AHEAD times the budget before the
    others are fitted anew and trained, so that they are behind what will run.

    Blocks are fitted on `fitting` (whose last eighth chooses ridges, heads and when training stops) and judged on
    `held_out`; both are sequences of token ids. `tick` is given a note after each decision and each look at a training.
    What `journal` holds is not done again. Several `replicas`, each with a model of its own, train together; the rest
    the main one does, and only its report counts. Raises InputError for a plan that drops nothing, and for too little
    text.
    """
    if not model.students:
        raise InputError("The plan drops nothing, so there is nothing to recover; plan with a larger budget.")
    if len(fitting) < 8 or len(held_out) < 2:
        raise InputError(
            f"{len(fitting)} sequences to fit on and {len(held_out)} to judge by are too few to recover with (8 and 2 "
            "at least); give more text, or lower seq_len or min_len."
        )
    dropped = {i: tiers.get(i) for i, s in sorted(model.students.items()) if s.strategy == Strategy.BLOCK_DROP}
    if heads:
        with_every_head(model, list(dropped), heads.every)  # before anything is fitted: it may be refused
    replicas = replicas or SimulatedComm(1)
    is_main = replicas.ranks[0] == 0
    text = HeldOut(model, held_out if is_main else [], batch_size=options.batch_size)
    judge = Judge(model, text, tick=tick or _ignore)
    before = judge.tally.kl() if is_main else 0.0
    treatments = {i: t for i, tier in dropped.items() if (t := _closed_form(options, tier))}
    only_mlps = all(s.strategy == Strategy.KEEP_SYNC for s in model.students.values())  # nothing is fitted to those
    trained = [i for i in (sorted(tiers) if only_mlps else dropped) if tiers.get(i) != "insensitive"]
    run, as_is = _Run(model, fitting, options, FinishedSteps(model, judge, journal, replicas)), dict(model.students)
    if is_main and treatments:
        run.treat_in_closed_form(treatments, as_is)
    run.finished.share(list(treatments))
    exact = run.replicate(heads, list(dropped)) if heads else []
    early: list[int] = []
    if budget and "refit" in options.methods:
        early = run.give_back(budget.model_copy(update={"value": AHEAD * budget.value}), "given-back-early")
    left = {i: t for i, t in treatments.items() if i in model.students}
    if exact or early:
        if is_main and left:  # those with every head, too: they read what the others leave
            run.treat_anew(left, {i: student for i, student in as_is.items() if i not in exact})
        run.finished.share(list(left))
    trained = [i for i in trained if i in model.students]
    if "distillation" in options.methods and trained:
        run.distil(trained)
    if budget:
        run.give_back(budget, "given-back")
    return RecoveryReport(dict(tiers), before, judge.tally.kl() if is_main else 0.0, judge.attempts)


def _closed_form(options: RecoveryOptions, tier: Tier | None) -> ClosedForm:
    """Return what a block of this tier is given without training.

    With `refit` among the methods every block is given what costs nothing at run time. Without it, the paper's tiers:
    insensitive blocks are left alone, and the extremely sensitive ones regrouped; all but the insensitive ones where
    none is trained.
    """
    methods, insensitive = options.methods, tier == "insensitive"
    refit = "refit" in methods
    if insensitive and not refit:
        return ClosedForm(group=False, compensate=False, refit=False, max_rank=0)
    return ClosedForm(
        group="grouping" in methods and (refit or tier == "extremely sensitive" or "distillation" not in methods),
        compensate="compensation" in methods,
        refit=refit,
        max_rank=0 if insensitive else options.max_rank,
    )


@dataclass(frozen=True)
class _Run:
    """A recovery under way: the model, the text it is fitted on, and the steps it has finished."""

    model: PlannedModel
    fitting: Sequences
    options: RecoveryOptions
    finished: FinishedSteps

    @cached_property
    def costs(self) -> list[ErrorCost] | None:
        """Return the costs of errors at every block's output, on every replica the same; None if too large to hold."""
        few = bisect.bisect_right(list(itertools.accumulate(map(len, self.fitting))), COST_TOKENS)
        feed = self._feed(SimulatedComm(1), self.fitting[: max(1, few)])
        return error_costs(feed, feed.batches, seed=self.options.seed) if fits_in_memory(feed) else None

    def treat_in_closed_form(self, treatments: Mapping[int, ClosedForm], as_is: Mapping[int, Student]) -> None:
        """Treat one block after the other without training, then judge the whole; on the main replica alone."""
        name, began = "closed-form", time.monotonic()
        if self.finished.take_over(name):
            return
        self._pass_over_blocks(treatments, name)
        self._keep_as_far_as_it_helps(as_is, began=began)
        self.finished.keep(name, list(treatments))

    def treat_anew(self, treatments: Mapping[int, ClosedForm], as_is: Mapping[int, Student]) -> None:
        """Treat blocks once more, now that some are the dense model's; those that `as_is` has begin from what it has.

        What they were fitted to before made up for what those others cost. The first treatments stay where the whole is
        no better with the second.
        """
        name, steps, began = "closed-form-anew", self.finished, time.monotonic()
        if steps.take_over(name):
            return
        judge, first = steps.judge, [self.model.students[block] for block in treatments]
        attempts = list(judge.attempts)
        judge.undo([student for block, student in as_is.items() if block in treatments])
        self._pass_over_blocks(treatments, name)
        if not judge.decide(None, TOGETHER, began=began, detail={"anew": list(treatments)}):
            judge.undo(first)
            judge.attempts[: len(attempts)] = attempts
        steps.keep(name, list(treatments))

    def _pass_over_blocks(self, treatments: Mapping[int, ClosedForm], name: str) -> None:
        """Treat one block after the other; each is kept in the journal by the name of the pass."""
        steps, feed = self.finished, self._feed(SimulatedComm(1), starts=True)
        for block, treatment in treatments.items():
            feed.move_to(block)
            if steps.take_over(f"{name}-{block}", measured=False):
                continue
            treat_block(block, treatment, feed=feed, judge=steps.judge, options=self.options, costs=self.costs)
            steps.keep(f"{name}-{block}", [block])

    def _keep_as_far_as_it_helps(self, as_is: Mapping[int, Student], *, began: float) -> None:
        """Judge the whole, and where it is no better, keep the treatments of as many of the first blocks as are.

        A block's treatment was fitted behind those before it, and knows nothing of those that follow: whichever were
        the last may be taken back.
        """
        judge = self.finished.judge
        treated = {attempt.block for attempt in judge.attempts if attempt.kept}
        made = [student for i, student in sorted(self.model.students.items()) if i in treated]
        good, bad, tried = 0, len(made) + 1, len(made)
        while good < tried < bad:
            for place, student in enumerate(made):
                self.model.put(student if place < tried else as_is[student.index])
            last = made[tried - 1].index
            if judge.decide(None, TOGETHER, began=began, detail={"up_to_block": last}):
                good = tried
            else:
                bad = tried
            tried = (good + bad) // 2
        for student in made[:good]:
            self.model.put(student)
        judge.undo([as_is[student.index] for student in made[good:]])

    def replicate(self, heads: Affordable, blocks: Sequence[int]) -> list[int]:
        """Replicate heads where the whole wins most by it, and return these blocks; all replicas call this at once."""
        judge = self.finished.judge
        chosen = self.finished.choice(
            "replicated", lambda: worth_replicating(self.model, judge.held_out, blocks, heads=heads, tick=judge.tick)
        )
        exact = [attempt.block for attempt in chosen if attempt.block is not None]
        judge.replaced(with_every_head(self.model, exact, heads.every), chosen)
        return exact

    def give_back(self, budget: Budget, name: str) -> list[int]:
        """Give blocks back to the dense model until the whole keeps `budget`; return them; all replicas call this.

        `name` is that of the step. Those of them with all heads on every rank are still students: of its weights.
        """
        judge, model = self.finished.judge, self.model
        given = self.finished.choice(
            name,
            lambda: give_back(model, judge.held_out, budget, measured=judge.tally.comparison(), tick=judge.tick),
        )
        blocks = [attempt.block for attempt in given if attempt.block is not None]
        exact = with_dense_weights(model)
        replace_blocks(model, model.students, blocks, instead=exact)
        if self.finished.is_main and given:
            judge.replaced([exact[block] for block in blocks if block in exact], given)
        return blocks

    def distil(self, blocks: Sequence[int]) -> None:
        """Train one block after the other, then all together; all replicas call this at once."""
        if self.options.block_schedule.steps:
            feed = self._feed(self.finished.replicas, starts=True)
            for block in blocks:
                feed.move_to(block)
                self._distil_block(block, feed)
            del feed
        self._distil_together(blocks)

    def _distil_block(self, block: int, feed: Feed) -> None:
        name, steps = f"distilled-{block}", self.finished
        if steps.has_trained(name):
            return
        began, student = time.monotonic(), self.model.students[block].copy()
        hooks = steps.training(name, f"block {block}")
        cost = self.costs[block] if self.costs else None
        outcome = distil_block(student, feed, cost=cost, schedule=self.options.block_schedule, hooks=hooks)
        before, detail = self.model.put(student), outcome.detail()
        if not steps.agreed(lambda: steps.judge.decide(block, "distillation", began=began, detail=detail)):
            self.model.put(before)
        steps.keep(name, [block])

    def _distil_together(self, blocks: Sequence[int]) -> None:
        name, steps = "distilled-together", self.finished
        if steps.has_trained(name):
            return
        began, feed = time.monotonic(), self._feed(steps.replicas)
        before = [self.model.put(self.model.students[b].copy()) for b in blocks]
        students = [self.model.students[b] for b in blocks]
        hooks = steps.training(name, "all treated blocks together")
        outcome = distil_together(students, feed, schedule=self.options.whole_schedule, hooks=hooks)
        detail = outcome.detail() | {"blocks": list(blocks)}
        if not steps.agreed(lambda: steps.judge.decide(None, "distillation end to end", began=began, detail=detail)):
            for student in before:
                self.model.put(student)
        steps.keep(name, blocks)

    def _feed(self, replicas: Comm, sequences: Sequences | None = None, *, starts: bool = False) -> Feed:
        return Feed(
            self.model,
            sequences or self.fitting,
            batch_size=min(self.options.batch_size, max(1, len(self.fitting) // 8)),
            own_inputs=self.options.own_inputs,
            replicas=replicas,
            starts=starts,
        )


def _ignore(note: str) -> None:
    pass
