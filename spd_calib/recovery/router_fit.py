"""Fitting the predictor by which a router reads more than the stream that all ranks share, in closed form.

With the attention's sync point dropped the router reads n2(x + b_o + r(u)), u = n1(x), x the stream that all ranks
share before the attention. r is fitted to what x + b_o lacks of what the dense model's router reads (before its norm),
by ridge regression. What counts of an error e there is what the router's own weights R make of it, R (g * e), g the
norm's weight: that chooses the ridge, and the directions that a predictor of low rank keeps. One of as high a rank as
there are experts thus does for the choice what the full one does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spd_calib.models.predictor import Predictor
from spd_calib.parallel.routing import tokens_routed_alike
from spd_calib.parallel.streams import Streams, defer

from .feed import Batch, Feed
from .predictor_fit import PredictorForm
from .ridge import Products, Ridge
from .student import Student

FLOOR = 1e-3  # of the metric's mean diagonal, for the directions that the router does not see


@dataclass(frozen=True)
class RouterFit:
    """A router's predictor (None: it reads the shared stream alone), and the share of tokens routed as dense."""

    form: str
    predictor: Predictor | None
    routed_as_dense: float
    weights: int  # that a rank reads more per token

    def detail(self) -> dict:
        """Return what the report says of it."""
        return {"form": self.form, "routed_as_dense": self.routed_as_dense}


def forms_for(experts: int, d: int, *, max_rank: int | None) -> list[PredictorForm]:
    """Return the forms to choose from: mean, ranks 2, 4, ... up to the number of experts, and full."""
    ranks = [k for k in (2**i for i in range(1, 16)) if k < experts] + [experts]
    allowed = [k for k in ranks if k < d and (max_rank is None or k <= max_rank)]
    full = [PredictorForm("full")] if max_rank is None or max_rank >= d else []
    return [PredictorForm("mean"), *(PredictorForm("low_rank", k) for k in allowed), *full]


@torch.no_grad()
def fit_router(student: Student, feed: Feed, *, forms: Sequence[PredictorForm]) -> list[RouterFit]:
    """Return no predictor, and one of each form, fitted for the router of the feed's present block."""
    mixture = student.parts.experts
    assert mixture is not None
    router, norm = mixture.router.get_parameter("weight").double(), student.parts.norm2.get_parameter("weight").double()
    seen = router * norm
    metric = seen.T @ seen
    metric = metric + FLOOR * metric.diagonal().mean() * torch.eye(
        len(metric), dtype=metric.dtype, device=metric.device
    )
    fitting, choosing = Products(), Products()
    for products, batches in ((fitting, feed.fitting), (choosing, feed.choosing)):
        for batch in batches:
            u, missing = _read_and_missing(student, feed, batch)
            products.add(torch.cat([u, u.new_ones(len(u), 1)], -1), missing)
    predictors: list[tuple[str, Predictor | None, int]] = [("zero", None, 0)]
    ridge = Ridge(fitting, choosing)
    best = ridge.best(metric)
    for form in forms:
        if form.kind == "mean":
            mean = fitting.xy[-1] / fitting.xx[-1, -1]
            predictors.append((str(form), Predictor(_like(mean, student)), 0))
        elif best is not None:
            slope, bias = best.change[:-1], best.change[-1]
            predictor = Predictor(_like(bias, student), w=_like(slope, student))
            if form.kind == "low_rank":
                a, b = _reduced(slope, fitting.xx[:-1, :-1], metric, form.rank)
                mean = fitting.xy[-1] / fitting.xx[-1, -1] - fitting.xx[-1, :-1] / fitting.xx[-1, -1] @ a @ b
                predictor = Predictor(_like(mean, student), a=_like(a, student), b=_like(b, student))
            d = student.block.width
            predictors.append((str(form), predictor, form.weights(d_rank=d, d=d)))
    return [
        RouterFit(form, predictor, _routed_as_dense(student.with_router(predictor), feed, feed.choosing), weights)
        for form, predictor, weights in predictors
    ]


def choose_router(fits: Sequence[RouterFit], *, block_weights: int, exchange: float = 1.0) -> RouterFit:
    """Return the fit that is worth its weights: 1 % more of the block's must route at least `exchange` % more right."""
    return min(fits, key=lambda f: 1 - f.routed_as_dense + exchange * f.weights / block_weights)


def _read_and_missing(student: Student, feed: Feed, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return what the predictor reads, and what it should say, [N, d] both."""
    s = feed.inputs(batch)
    missing = feed.dense_read(batch) - _shared_behind(student, s)
    return student.block.norm1(s.shared)[batch.mask], missing[batch.mask]


def _shared_behind(student: Student, s: Streams) -> Tensor:
    """Return what all ranks share behind an attention whose sync point is dropped, [B, T, d]."""
    return defer(s, [torch.zeros_like(s.shared)] * student.block.comm.size, student.block.attention_branch).shared


def _routed_as_dense(student: Student, feed: Feed, batches: Sequence[Batch]) -> float:
    """Return the share of tokens for which the student's router chooses what the dense model's does."""
    block, alike, count = student.block, 0.0, 0
    drop = student.drops.at(block.attention_point)
    for batch in batches:
        s = feed.inputs(batch)
        planned = block.route(_shared_behind(student, s), block.expected(drop, s)).chosen
        dense = feed.model.lm.blocks[feed.index].route(feed.dense_read(batch)).chosen
        alike += sum(tokens_routed_alike({block.index: dense}, {block.index: planned}, batch.mask))
        count += int(batch.mask.sum())
    return alike / max(count, 1)


def _reduced(w: Tensor, xx: Tensor, metric: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return W [d, d] as A [d, k] times B [k, d]: the k directions that count most in the metric."""
    values, vectors = torch.linalg.eigh(metric)
    half, inverse = ((vectors * values.sqrt() ** sign) @ vectors.T for sign in (1, -1))
    identity = torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
    root = torch.linalg.cholesky(xx + 1e-6 * xx.diagonal().mean() * identity)
    v = torch.linalg.svd(root.T @ w @ half, full_matrices=False).Vh[:k]
    return w @ half @ v.T, v @ inverse


def _like(tensor: Tensor, student: Student) -> Tensor:
    return tensor.to(student.parts.o.weight).contiguous()
