"""Treating a block without training: predictors for its MLP, and other places for its heads and neurons."""

import time

from torch import Tensor

from . import predictor_fit
from .feed import Feed
from .head_grouping import head_orders
from .judge import Judge
from .moments import HeadMoments
from .neuron_grouping import distortion, group_neurons
from .options import RecoveryOptions
from .permute import entries, permute_heads
from .predictor_fit import MEAN, Fit
from .student import Student

GROUPING_BATCHES = 8  # neurons are placed by as much of the text; predictors are fitted on all of it


def treat_block(
    block: int, *, feed: Feed, judge: Judge, options: RecoveryOptions, group: bool, metric: Tensor | None = None
) -> None:
    """Try the closed-form treatments of the feed's present block, one after the other.

    First predictors for the heads as they are; then, if `group`, heads and neurons are placed under the predictors,
    which are fitted anew. `metric` [d, d] weighs errors at the block's output (moments.output_gradient_moments).
    """
    students, compensate = feed.model.students, "compensation" in options.methods
    if not compensate and not group:
        return
    untreated = students[block].copy()
    moments = HeadMoments.of(students[block], feed)  # of its order of heads
    if compensate:
        _compensate(untreated, moments, judge=judge, options=options)
    if group:
        grouping = _Grouping(untreated, feed, moments, options, metric)
        with_predictors = students[block].predictors is not None
        began = time.monotonic()
        grouped, detail = grouping.best(with_predictors)
        judge.try_out(grouped, "grouping", began=began, detail=detail)
        if compensate and not with_predictors:  # predictors were no gain alone; under a grouping they may be one
            began = time.monotonic()
            both, detail = grouping.best(True)
            judge.try_out(both, "grouping+compensation", began=began, detail=detail)


def _compensate(untreated: Student, moments: HeadMoments, *, judge: Judge, options: RecoveryOptions) -> None:
    """Try the predictors that are worth their weights; where these are refused, try the mean, which costs nothing."""
    began, student = time.monotonic(), untreated.copy()
    fit = _best_fit(student, moments, options)
    stays = judge.try_out(student.with_predictors(fit.predictors), "compensation", began=began, detail=fit.detail())
    if not stays and fit.form != MEAN:
        fit = predictor_fit.fit(student, moments, forms=[MEAN])[0]
        judge.try_out(student.with_predictors(fit.predictors), "compensation", began=began, detail=fit.detail())


def _best_fit(student: Student, moments: HeadMoments, options: RecoveryOptions) -> Fit:
    """Return the predictors of the form that is worth its weights."""
    block = student.block
    forms = predictor_fit.forms_up_to(options.max_rank, d_rank=block.d_rank)
    weights = sum(linear.weight.numel() for linear in student.parts.linears) // block.comm.size
    return predictor_fit.choose(
        predictor_fit.fit(student, moments, forms=forms),
        d_rank=block.d_rank,
        d=block.width,
        block_weights=weights,
        exchange=options.exchange,
    )


class _Grouping:
    """Places heads and neurons of an untreated student, the feed's present block."""

    def __init__(
        self, untreated: Student, feed: Feed, moments: HeadMoments, options: RecoveryOptions, metric: Tensor | None
    ):
        self.untreated, self.feed, self.moments = untreated, feed, moments
        self.options, self.metric = options, metric

    def best(self, predict: bool) -> tuple[Student, dict]:
        """Return a student with the order of heads that distorts the block least, and what the report says of it.

        Each order is measured with neurons placed for it and, if `predict`, with predictors of its own.
        """
        orders = head_orders(self.untreated, self.moments.fitting, seed=self.options.seed)
        found = [self._placed(name, order, predict) for name, order in orders.items()]
        student, detail = min(found, key=lambda placed: placed[1]["distortion"])
        return student, detail | {"tried": {d["heads"]: d["distortion"] for _, d in found}}

    def _placed(self, name: str, order: Tensor, predict: bool) -> tuple[Student, dict]:
        student, detail = self.untreated.copy(), {"heads": name}
        permute_heads(student.parts, student.counts, order)
        if predict:
            z = entries(order, student.counts.head_dim).to(self.moments.fitting.mean.device)
            fit = _best_fit(student, self.moments.permuted(z), self.options)
            student, detail = student.with_predictors(fit.predictors), detail | fit.detail()
        group_neurons(student, self.feed, self.feed.fitting[:GROUPING_BATCHES], metric=self.metric)
        return student, detail | {"distortion": distortion(student, self.feed, self.feed.choosing)}
