"""Treating a block without training: predictors, other places for heads and neurons, weights refitted.

A treatment stays where the error at the block's output falls, on tokens that nothing was fitted on and in the metric of
what it costs in KL: so all blocks are treated in one pass over the text. What all of it together does to the model is
for recover.py to judge.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from . import predictor_fit
from .feed import Feed
from .head_grouping import head_orders
from .judge import Judge
from .moments import HeadMoments
from .neuron_grouping import distortion, group_neurons
from .options import RecoveryOptions
from .permute import entries, permute_heads
from .predictor_fit import Fit
from .refit import output_error, refit_attention, refit_down, refit_mlp_inputs
from .student import Student

METRIC_BATCHES = 8  # to see by what an error costs; the gradients' moments are shrunk for so few tokens
GROUPING_BATCHES = 8  # neurons are placed by as much of the text; everything else is fitted on all of it


@dataclass(frozen=True)
class ClosedForm:
    """The treatments that a block is given; `max_rank` bounds its predictors (predictor_fit.forms_up_to)."""

    group: bool
    compensate: bool
    refit: bool
    max_rank: int | None

    def __bool__(self) -> bool:
        return self.group or self.compensate or self.refit


def treat_block(
    block: int,
    treatment: ClosedForm,
    *,
    feed: Feed,
    judge: Judge,
    options: RecoveryOptions,
    metric: Tensor | None = None,
) -> None:
    """Give the feed's present block its treatments, one upon the other; the model has it afterwards.

    First its attention is refitted, then come predictors, then heads and neurons are placed under the predictors,
    which are fitted anew, and last the MLP is refitted, its first layers before down_proj. `metric` [d, d] weighs
    errors at the block's output (moments.output_gradient_moments).
    """
    trial = _Trial(feed.model.students[block], feed, judge, metric)
    parts = options.refit_parts if treatment.refit else ()
    if "attention" in parts:
        trial.refit("refit of q, k, v", refit_attention)
    if treatment.compensate or treatment.group:
        moments = HeadMoments.of(trial.student, feed)  # of its order of heads
    if treatment.compensate:
        began = time.monotonic()
        fit = _best_fit(trial.student, moments, treatment, options)
        predicting = trial.student.copy().with_predictors(fit.predictors)
        trial.decide(predicting, "compensation", began=began, detail=fit.detail())
    if treatment.group:
        began = time.monotonic()
        grouping = _Grouping(trial.student, feed, moments, treatment, options, metric)
        grouped, detail = grouping.best(trial.student.predictors is not None)
        trial.decide(grouped, "grouping", began=began, detail=detail)
    if "mlp_in" in parts:
        trial.refit("refit of the MLP's first layers", refit_mlp_inputs)
    if "down" in parts:
        trial.refit("refit of down", refit_down)
    if trial.improved:
        feed.model.put(trial.student)


class _Trial:
    """A block under treatment: the student as it is by now, and the error at its output."""

    def __init__(self, student: Student, feed: Feed, judge: Judge, metric: Tensor | None):
        self.student, self.feed, self.judge, self.metric = student, feed, judge, metric
        self.error, self.improved = output_error(student, feed, feed.choosing, metric=metric), False

    def refit(self, name: str, refit: Callable[[Student, Feed], dict]) -> None:
        """Try one of the refits on a copy of the student."""
        began, student = time.monotonic(), self.student.copy()
        detail = refit(student, self.feed)
        if any(detail.values()):
            self.decide(student, name, began=began, detail=detail)

    def decide(self, student: Student, name: str, *, began: float, detail: dict) -> None:
        """Take a treated student in place of the present one if the error is less with it."""
        error = output_error(student, self.feed, self.feed.choosing, metric=self.metric)
        if self.judge.note(student.index, name, before=self.error, after=error, began=began, detail=detail):
            self.student, self.error, self.improved = student, error, True


def _best_fit(student: Student, moments: HeadMoments, treatment: ClosedForm, options: RecoveryOptions) -> Fit:
    """Return the predictors of the form that is worth its weights."""
    block = student.block
    forms = predictor_fit.forms_up_to(treatment.max_rank, d_rank=block.d_rank)
    weights = sum(linear.weight.numel() for linear in student.parts.linears) // block.comm.size
    return predictor_fit.choose(
        predictor_fit.fit(student, moments, forms=forms),
        d_rank=block.d_rank,
        d=block.width,
        block_weights=weights,
        exchange=options.exchange,
    )


@dataclass(frozen=True)
class _Grouping:
    """Places heads and neurons of a student, the feed's present block. `moments` are of its own order of heads."""

    student: Student
    feed: Feed
    moments: HeadMoments
    treatment: ClosedForm
    options: RecoveryOptions
    metric: Tensor | None

    def best(self, predict: bool) -> tuple[Student, dict]:
        """Return a student with the order of heads that distorts the block least, and what the report says of it.

        Each order is measured with neurons placed for it and, if `predict`, with predictors of its own.
        """
        orders = head_orders(self.student, self.moments.fitting, seed=self.options.seed)
        found = [self._placed(name, order, predict) for name, order in orders.items()]
        student, detail = min(found, key=lambda placed: placed[1]["distortion"])
        return student, detail | {"tried": {d["heads"]: d["distortion"] for _, d in found}}

    def _placed(self, name: str, order: Tensor, predict: bool) -> tuple[Student, dict]:
        student, detail = self.student.copy(), {"heads": name}
        permute_heads(student.parts, student.counts, order)
        if predict:
            z = entries(order, student.counts.head_dim).to(self.moments.fitting.mean.device)
            fit = _best_fit(student, self.moments.permuted(z), self.treatment, self.options)
            student, detail = student.with_predictors(fit.predictors), detail | fit.detail()
        group_neurons(student, self.feed, self.feed.fitting[:GROUPING_BATCHES], metric=self.metric)
        return student, detail | {"distortion": distortion(student, self.feed, self.feed.choosing)}
