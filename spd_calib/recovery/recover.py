"""Treating the blocks of a plan: what is tried, in which order, and what is kept.

Never worse: a treatment stays only where the KL of the whole plan, on text that nothing was fitted on, falls by more
than the standard error of that fall. Everything tried stands in the report.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from spd_calib.errors import InputError
from spd_calib.formats.drops import Strategy
from spd_calib.parallel.comm import Comm, SimulatedComm
from spd_calib.sensitivity.tiers import Tier

from .closed_form import GROUPING_BATCHES, treat_block
from .distillation import distil_block, distil_together
from .feed import Feed
from .finished import FinishedSteps
from .held_out import HeldOut
from .journal import TensorJournal
from .judge import Judge
from .moments import fits_in_memory, output_gradient_moments
from .options import RecoveryOptions
from .planned_model import PlannedModel
from .report import RecoveryReport

Sequences = Sequence[Sequence[int]]


def recover(
    model: PlannedModel,
    *,
    fitting: Sequences,
    held_out: Sequences,
    tiers: Mapping[int, Tier],
    options: RecoveryOptions = RecoveryOptions(),
    journal: TensorJournal | None = None,
    tick: Callable[[str], None] | None = None,
    replicas: Comm | None = None,
) -> RecoveryReport:
    """Treat the dropped blocks of `model` by their tiers; its students are then what was kept.

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
    replicas = replicas or SimulatedComm(1)
    is_main = replicas.ranks[0] == 0
    text = HeldOut(model, held_out if is_main else [], batch_size=options.batch_size)
    judge = Judge(model, text, tick=tick or _ignore)
    before = judge.tally.kl() if is_main else 0.0
    treated = {
        i: tiers.get(i)
        for i, student in sorted(model.students.items())
        if student.strategy == Strategy.BLOCK_DROP and tiers.get(i) != "insensitive"
    }
    run = _Run(model, fitting, options, FinishedSteps(model, judge, journal, replicas))
    if is_main:
        run.treat_in_closed_form(treated)
    run.finished.share(list(treated))
    if "distillation" in options.methods and treated:
        run.distil(list(treated))
    return RecoveryReport(dict(tiers), before, judge.tally.kl() if is_main else 0.0, judge.attempts)


@dataclass(frozen=True)
class _Run:
    """A recovery under way: the model, the text it is fitted on, and the steps it has finished."""

    model: PlannedModel
    fitting: Sequences
    options: RecoveryOptions
    finished: FinishedSteps

    def treat_in_closed_form(self, treated: Mapping[int, Tier | None]) -> None:
        """Try predictors and groupings on one block after the other; on the main replica alone."""
        methods = self.options.methods
        if "grouping" not in methods and "compensation" not in methods:
            return
        feed, metrics = self._feed(SimulatedComm(1)), None
        if "grouping" in methods and fits_in_memory(feed):
            metrics = output_gradient_moments(feed, feed.fitting[:GROUPING_BATCHES], seed=self.options.seed)
        for block, tier in treated.items():
            feed.move_to(block)
            name = f"closed-form-{block}"
            if self.finished.take_over(self.finished.saved(name)):
                continue
            treat_block(
                block,
                feed=feed,
                judge=self.finished.judge,
                options=self.options,
                group="grouping" in methods and (tier == "extremely sensitive" or "distillation" not in methods),
                metric=metrics[block] if metrics else None,
            )
            self.finished.keep(name, [block])

    def distil(self, blocks: Sequence[int]) -> None:
        """Train one block after the other, then all together; all replicas call this at once."""
        feed = self._feed(self.finished.replicas)
        for block in blocks:
            feed.move_to(block)
            self._distil_block(block, feed)
        self._distil_together(blocks)

    def _distil_block(self, block: int, feed: Feed) -> None:
        name, steps = f"distilled-{block}", self.finished
        if steps.take_over(steps.agreed(lambda: steps.saved(name))):
            return
        began, student = time.monotonic(), self.model.students[block].copy()
        hooks = steps.training(name, f"block {block}")
        outcome = distil_block(student, feed, schedule=self.options.block_schedule, hooks=hooks)
        before, detail = self.model.put(student), outcome.detail()
        if not steps.agreed(lambda: steps.judge.decide(block, "distillation", began=began, detail=detail)):
            self.model.put(before)
        steps.keep(name, [block])

    def _distil_together(self, blocks: Sequence[int]) -> None:
        name, steps = "distilled-together", self.finished
        if steps.take_over(steps.agreed(lambda: steps.saved(name))):
            return
        began, feed = time.monotonic(), self._feed(steps.replicas)
        before = [self.model.put(self.model.students[b].copy()) for b in blocks]
        students = [self.model.students[b] for b in blocks]
        hooks = steps.training(name, "all treated blocks together")
        outcome = distil_together(students, feed, schedule=self.options.whole_schedule, hooks=hooks)
        detail = outcome.detail()
        if not steps.agreed(lambda: steps.judge.decide(None, "distillation end to end", began=began, detail=detail)):
            for student in before:
                self.model.put(student)
        steps.keep(name, blocks)

    def _feed(self, replicas: Comm) -> Feed:
        size = min(self.options.batch_size, max(1, len(self.fitting) // 8))
        return Feed(self.model, self.fitting, batch_size=size, own_inputs=self.options.own_inputs, replicas=replicas)


def _ignore(note: str) -> None:
    pass
