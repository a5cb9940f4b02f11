"""Treating a block without training: predictors, other places for heads and neurons, weights refitted.

A treatment stays where the error at the block's output falls, on tokens that nothing was fitted on and in the metric of
what it costs in KL: so all blocks are treated in one pass over the text. What all of it together does to the model is
for recover.py to judge.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from spd_calib.models.parts import ExpertParts

from . import predictor_fit
from .behind_norm import fit_behind_norm
from .error_cost import ErrorCost
from .expert_grouping import group_expert_neurons
from .feed import Feed
from .head_grouping import head_orders
from .judge import Judge
from .moments import HeadMoments
from .neuron_grouping import distortion, group_neurons
from .options import RecoveryOptions
from .permute import entries, permute_heads
from .predictor_fit import Fit
from .refit import (
    Detail,
    fit_mlp_reads,
    output_error,
    put_into_mlp_inputs,
    refit_attention,
    refit_down,
    refit_mlp_inputs,
    refit_o,
)
from .router_fit import choose_router, fit_router, forms_for
from .student import Student

COST_TOKENS = 4096  # to see what an error costs; its direction is shrunk for so few
GROUPING_TOKENS = 16384  # neurons are placed by as much of the text; everything else is fitted on all of it


@dataclass(frozen=True)
class ClosedForm:
    """The treatments that a block is given; `max_rank` bounds its predictors (RecoveryOptions)."""

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
    costs: Sequence[ErrorCost] | None = None,
) -> None:
    """Give the feed's present block its treatments, one upon the other; the model has it afterwards.

    First its attention is refitted, then come predictors, then heads and neurons are placed under the predictors
    (fitted anew) and as the refitted first layers of the MLP will read, and last down_proj is refitted. `costs` are
    those of errors at the output of every block.
    """
    cost = costs[block] if costs else None
    trial = _Trial(feed.model.students[block], feed, judge, cost)
    parts = options.refit_parts if treatment.refit else ()
    mixture = trial.student.parts.experts
    if mixture is not None:  # an expert sees few tokens, and which ones depends on the weights: no one regression
        parts = tuple(part for part in parts if part not in ("mlp_in", "down"))
    if "attention" in parts:
        before = costs[block - 1] if costs and block else None
        trial.refit("refit of q, k, v", refit_attention, cost=before)
    if "o" in parts:
        trial.refit("refit of o", refit_o, cost=cost)
    if trial.student.has_every_head:  # the ranks miss nothing that a predictor could give, or an order of heads spare
        treatment = replace(treatment, compensate=False, group=False)
    if treatment.max_rank is None and "mlp_in" in parts and trial.student.block.attention_out_norm is None:
        # its refit maps what the MLP reads, the rank's own share in it: further weights would win next to nothing
        treatment = replace(treatment, max_rank=0)
    if treatment.compensate or treatment.group:
        moments = HeadMoments.of(trial.student, feed)  # of its order of heads
    if treatment.compensate:
        began = time.monotonic()
        fit = _best_fit(trial.student, moments, treatment, options, feed=feed, cost=cost)
        predicting = trial.student.copy().with_predictors(fit.predictors)
        trial.decide(predicting, "compensation", began=began, detail=fit.detail())
        if mixture is not None:
            trial.predict_for_router(mixture, treatment, options)
    reads_refitted = False
    if treatment.group:
        began = time.monotonic()
        grouping = _Grouping(trial.student, feed, moments, treatment, options, cost)
        grouped, detail = grouping.best(trial.student.predictors is not None)
        grouped_kept = trial.decide(grouped, "grouping", began=began, detail=detail)
        reads_refitted = grouped_kept and "mlp_in" in parts
    if "mlp_in" in parts and not reads_refitted:
        trial.refit("refit of the MLP's first layers", refit_mlp_inputs, cost=cost)
    if "down" in parts:
        trial.refit("refit of down", refit_down, cost=cost)
    if trial.improved:
        feed.model.put(trial.student)


class _Trial:
    """A block under treatment: the student as it is by now, and the error at its output."""

    def __init__(self, student: Student, feed: Feed, judge: Judge, cost: ErrorCost | None):
        self.student, self.feed, self.judge, self.cost = student, feed, judge, cost
        self.error, self.improved = output_error(student, feed, feed.regressed[1], cost=cost), False

    def refit(self, name: str, refit: Callable[..., Detail], *, cost: ErrorCost | None) -> None:
        """Try one of the refits on a copy of the student."""
        began, student = time.monotonic(), self.student.copy()
        detail = refit(student, self.feed, cost=cost)
        if any(detail.values()):
            self.decide(student, name, began=began, detail=detail)

    def predict_for_router(self, mixture: ExpertParts, treatment: ClosedForm, options: RecoveryOptions) -> None:
        """Try the router's predictor that is worth its weights."""
        began, block = time.monotonic(), self.student.block
        forms = forms_for(len(mixture.experts.get_parameter("down_proj")), block.width, max_rank=treatment.max_rank)
        fits = fit_router(self.student, self.feed, forms=forms)
        fit = choose_router(fits, block_weights=_block_weights(self.student), exchange=options.exchange)
        detail = fit.detail() | {"tried": {f.form: f.routed_as_dense for f in fits}}
        self.decide(self.student.copy().with_router(fit.predictor), "router", began=began, detail=detail)

    def decide(self, student: Student, name: str, *, began: float, detail: dict) -> bool:
        """Take a treated student in place of the present one if the error is less with it; say whether it is."""
        error = output_error(student, self.feed, self.feed.regressed[1], cost=self.cost)
        kept = self.judge.note(student.index, name, before=self.error, after=error, began=began, detail=detail)
        if kept:
            self.student, self.error, self.improved = student, error, True
        return kept


def _block_weights(student: Student) -> int:
    """Return the weights that a rank reads of the block for a token, all experts counted."""
    mixture = student.parts.experts
    of_experts = sum(p.numel() for p in mixture.experts.parameters()) if mixture else 0
    return (sum(linear.weight.numel() for linear in student.parts.linears) + of_experts) // student.block.comm.size


def _best_fit(
    student: Student,
    moments: HeadMoments,
    treatment: ClosedForm,
    options: RecoveryOptions,
    *,
    feed: Feed,
    cost: ErrorCost | None,
) -> Fit:
    """Return the predictors of the form that is worth its weights; `moments` are of the student's order of heads.

    They tell all where what joins the stream is linear in the heads; behind a norm it is looked at anew.
    """
    block = student.block
    forms = predictor_fit.forms_up_to(treatment.max_rank, d_rank=student.seen_by_a_rank)
    weights = _block_weights(student)
    if block.attention_out_norm is None:
        fits = predictor_fit.fit(student, moments, forms=forms)
    else:
        fits = fit_behind_norm(student, feed, forms=forms, cost=cost)
    return predictor_fit.choose(
        fits,
        d_rank=student.seen_by_a_rank,
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
    cost: ErrorCost | None

    def best(self, predict: bool) -> tuple[Student, dict]:
        """Return a student with the order of heads that distorts the block least, and what the report says of it.

        Each order is measured with neurons placed for it and, if `predict`, with predictors of its own. Where the
        MLP's first layers are to be refitted, they are.
        """
        orders = head_orders(self.student, self.moments.fitting, seed=self.options.seed)
        found = [self._placed(name, order, predict) for name, order in orders.items()]
        student, detail = min(found, key=lambda placed: placed[1]["distortion"])
        return student, detail | {"tried": {d["heads"]: d["distortion"] for _, d in found}}

    def _placed(self, name: str, order: Tensor, predict: bool) -> tuple[Student, dict]:
        student, detail = self.student.copy(), dict[str, Any](heads=name)
        permute_heads(student.parts, student.counts, order)
        if predict:
            z = entries(order, student.counts.head_dim).to(self.moments.fitting.mean.device)
            fit = _best_fit(
                student,
                self.moments.permuted(z),
                self.treatment,
                self.options,
                feed=self.feed,
                cost=self.cost,
            )
            student, detail = student.with_predictors(fit.predictors), detail | fit.detail()
        if student.parts.experts is not None:
            group_expert_neurons(student, self.feed, self.feed.some(GROUPING_TOKENS))
            return student, detail | {"distortion": distortion(student, self.feed, self.feed.choosing)}
        fits = None
        if self.treatment.refit and "mlp_in" in self.options.refit_parts:
            fits = fit_mlp_reads(student, self.feed, cost=self.cost)
        group_neurons(student, self.feed, self.feed.some(GROUPING_TOKENS), cost=self.cost, fits=fits)
        detail["distortion"] = distortion(student, self.feed, self.feed.choosing)
        if fits is not None:
            detail["reads"] = put_into_mlp_inputs(student, fits)
        return student, detail
