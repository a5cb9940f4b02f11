"""Fitting the predictors, which a rank's MLP reads in place of its own partial sum: closed form, from second moments.

A rank S with head outputs z_S and the slice O_S of o_proj has the partial sum z_S O_S of the attention output a = z O.
Its predictor (models/predictor.py has the three forms) is fitted to what the rank misses, m = a - z_S O_S. Ridge
regression gives the full predictor; the best one of rank k for the squared error is its projection on the k strongest
directions of what it predicts (reduced-rank regression, Izenman 1975).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spd_calib.models.predictor import Predictor, PredictorKind, predictor_shapes

from .moments import HeadMoments, Moments, o_matrix, rank_columns
from .student import Student

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # relative to the mean variance of z_S; the tokens to choose by decide


@dataclass(frozen=True)
class PredictorForm:
    """The form of a predictor; `rank` is that of the low-rank one, 0 for the others."""

    kind: PredictorKind
    rank: int = 0

    def weights(self, *, d_rank: int, d: int) -> int:
        """Return the weights that a rank reads more per token. A bias is not counted: it joins one that is there."""
        shapes = predictor_shapes(self.kind, self.rank, d_rank=d_rank, d=d)
        return sum(math.prod(shape) for name, shape in shapes.items() if name != "bias")

    def __str__(self) -> str:
        return f"rank {self.rank}" if self.kind == "low_rank" else self.kind


MEAN = PredictorForm("mean")


def forms_up_to(max_rank: int | None, *, d_rank: int) -> list[PredictorForm]:
    """Return the forms to choose from: mean, rank 1, 2, 4, ... and `max_rank` itself, and full.

    The full predictor is among them where `max_rank` is at least d_rank, or None.
    """
    ranks = [2**i for i in range(16) if 2**i < d_rank and (max_rank is None or 2**i <= max_rank)]
    if max_rank is not None and 0 < max_rank < d_rank and max_rank not in ranks:
        ranks.append(max_rank)
    full = [PredictorForm("full")] if max_rank is None or max_rank >= d_rank else []
    return [MEAN, *(PredictorForm("low_rank", k) for k in ranks), *full]


@dataclass(frozen=True)
class Fit:
    """Fitted predictors of one form, by rank.

    `left` is the share of what the ranks miss (its mean square, over the tokens to choose by) that they leave.
    """

    form: PredictorForm
    predictors: Mapping[int, Predictor]
    left: float

    def detail(self) -> dict:
        """Return what the report says of it."""
        return {"form": self.form.kind, "rank": self.form.rank, "left": self.left}


def fit(student: Student, moments: HeadMoments, *, forms: Sequence[PredictorForm]) -> list[Fit]:
    """Fit predictors of each form for every rank of a block; the ridge is chosen for each form and rank."""
    o = o_matrix(student)
    rows: dict[PredictorForm, list[tuple[Predictor, float]]] = {form: [] for form in forms}
    missed = 0.0
    for own in rank_columns(student):
        o_missing = o.clone()
        o_missing[own] = 0.0  # m = z o_missing
        fitting, choosing = (_Missing.of(m, o_missing, own=own) for m in (moments.fitting, moments.choosing))
        missed += choosing.left(None, torch.zeros_like(choosing.mean))
        for form, row in _fit_rank(fitting, choosing, o_own=o[own], forms=forms).items():
            rows[form].append(row)
    dtype = student.parts.o.weight.dtype
    return [
        Fit(
            form,
            {rank: predictor.to(dtype) for rank, (predictor, _) in enumerate(row)},
            sum(left for _, left in row) / max(missed, 1e-30),
        )
        for form, row in rows.items()
    ]


def choose(fits: Sequence[Fit], *, d_rank: int, d: int, block_weights: int, exchange: float = 1.0) -> Fit:
    """Return the fit that is worth its weights.

    1 % more weights of the block, read per token on a rank, must explain at least `exchange` % more of what the ranks
    miss. `block_weights` is the number that a rank reads of the block without predictors.
    """
    return min(fits, key=lambda f: f.left + exchange * f.form.weights(d_rank=d_rank, d=d) / block_weights)


@dataclass(frozen=True)
class _Missing:
    """Moments of what a rank misses, m [d], and of its own head outputs z_S [d_rank]."""

    mean: Tensor  # of m
    own_mean: Tensor  # of z_S
    spread: float  # E |m - mean|^2
    own: Tensor  # covariance of z_S [d_rank, d_rank]
    cross: Tensor  # covariance of z_S with m [d_rank, d]

    @classmethod
    def of(cls, m: Moments, o_missing: Tensor, *, own: Tensor) -> "_Missing":
        with_all = m.covariance @ o_missing
        spread = (o_missing * with_all).sum().item()
        return cls(m.mean @ o_missing, m.mean[own], spread, m.covariance[own][:, own], with_all[own])

    def left(self, slope: Tensor | None, bias: Tensor) -> float:
        """Return E |m - z_S slope - bias|^2, without a slope E |m - bias|^2."""
        spread, off = self.spread, self.mean - bias
        if slope is not None:
            spread += (slope * (self.own @ slope - 2 * self.cross)).sum().item()
            off = off - self.own_mean @ slope
        return spread + off.square().sum().item()


def _fit_rank(
    fitting: _Missing, choosing: _Missing, *, o_own: Tensor, forms: Sequence[PredictorForm]
) -> dict[PredictorForm, tuple[Predictor, float]]:
    """Return one rank's predictor of each form, and the mean square of what it leaves of what the rank misses."""
    target = fitting.mean
    found: dict[PredictorForm, tuple[Predictor, float]] = {}
    full = [] if all(f.kind == "mean" for f in forms) else [_ridge(fitting, ridge) for ridge in RIDGES]
    for form in forms:
        if form.kind == "mean":
            found[form] = Predictor(target.clone()), choosing.left(None, target)
            continue
        tried = []
        for w, root in full:
            a, b = project(w, root, form.rank) if form.kind == "low_rank" else (w, None)
            slope = a if b is None else a @ b
            bias = target - fitting.own_mean @ slope
            tried.append((choosing.left(slope, bias), bias, a, b))
        left, bias, a, b = min(tried, key=lambda t: t[0])
        predictor = Predictor(bias.clone(), w=o_own + a) if b is None else Predictor(bias.clone(), a=a, b=b)
        found[form] = predictor, left
    return found


def _ridge(missing: _Missing, ridge: float) -> tuple[Tensor, Tensor]:
    """Return W [d_rank, d] = (C_SS + r I)^-1 C_Sm, and the Cholesky factor of C_SS + r I."""
    c = missing.own
    c = c + (ridge * c.diagonal().mean() + 1e-12) * torch.eye(len(c), dtype=c.dtype, device=c.device)
    root = torch.linalg.cholesky(c)
    return torch.cholesky_solve(missing.cross, root), root


def project(w: Tensor, root: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return W projected on the k directions in which its predictions vary most, as A [d_rank, k] and B [k, d]."""
    v = torch.linalg.svd(root.T @ w, full_matrices=False).Vh[:k]
    return w @ v.T, v
