"""Fitting what a rank's MLP reads in place of its own partial sum: closed form, from second moments.

Per rank, with z_S its own head outputs, the target is what it misses, m = a - z_S O_S (parallel/compensation.py has
the three forms). Ridge regression gives the full predictor; the best of rank k for the squared error is its
projection on the k strongest directions of what it predicts (reduced-rank regression, Izenman 1975).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spd_calib.parallel.compensation import Compensation, Kind

from .moments import Moments, o_matrix, rank_columns
from .planned import Student

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # relative to the mean variance of z_S; the held-out tokens choose


@dataclass(frozen=True)
class Form:
    """One rung of the ladder."""

    kind: Kind
    rank: int = 0

    def weights(self, d_rank: int, d: int) -> int:
        """Weights a rank reads more per token: the mean is a bias, added to one that is there or fused."""
        return {"mean": 0, "low_rank": self.rank * (d_rank + d), "full": d_rank * d}[self.kind]

    def __str__(self) -> str:
        return f"rank {self.rank}" if self.kind == "low_rank" else self.kind


def ladder(max_rank: int | None, d_rank: int) -> list[Form]:
    """Mean, rank 1, 2, 4, ... up to `max_rank`, and the full predictor where `max_rank` allows for it or is None."""
    ranks = [2**i for i in range(16) if 2**i < d_rank and (max_rank is None or 2**i <= max_rank)]
    if max_rank is not None and 0 < max_rank < d_rank and max_rank not in ranks:
        ranks.append(max_rank)
    full = [Form("full")] if max_rank is None or max_rank >= d_rank else []
    return [Form("mean"), *(Form("low_rank", k) for k in ranks), *full]


@dataclass(frozen=True)
class Fit:
    """A predictor for every rank, and the share of what the ranks miss (energy, mean included) that it leaves."""

    form: Form
    predictors: list[Compensation]
    left: float


def fit(student: Student, tp: int, fitted: Moments, held: Moments, forms: Sequence[Form]) -> list[Fit]:
    """Fit each form on `fitted`; `left` is over the tokens of `held`, which also choose the ridge."""
    o, columns = o_matrix(student), rank_columns(student, tp)
    rows: dict[Form, list[tuple[Compensation, float]]] = {form: [] for form in forms}
    missed = 0.0
    for own in columns:
        o_missing = o.clone()
        o_missing[own] = 0.0  # m = z o_missing
        missed += _energy(held, o_missing)
        target = fitted.mean @ o_missing
        options = (
            [] if all(f.kind == "mean" for f in forms) else [_ridge(fitted, o_missing, own, ridge) for ridge in RIDGES]
        )
        for form in forms:
            if form.kind == "mean":
                rows[form].append(
                    (_predictor(form, target, None, None, o[own]), _left(held, o_missing, own, None, target))
                )
                continue
            tried = []
            for w, root in options:
                a, b = _project(w, root, form.rank) if form.kind == "low_rank" else (w, None)
                slope = a if b is None else a @ b
                bias = target - fitted.mean[own] @ slope
                tried.append((_left(held, o_missing, own, slope, bias), bias, a, b))
            left, bias, a, b = min(tried, key=lambda t: t[0])
            rows[form].append((_predictor(form, bias, a, b, o[own]), left))
    return [
        Fit(
            form,
            [p.to(student.parts.o.weight.dtype) for p, _ in row],
            sum(left for _, left in row) / max(missed, 1e-30),
        )
        for form, row in rows.items()
    ]


def choose(fits: Sequence[Fit], d_rank: int, d: int, block_weights: int, exchange: float = 1.0) -> Fit:
    """The form that is worth its weights: 1 % more weights of the block, read per token on a rank, must explain at
    least `exchange` % more of what the ranks miss. `block_weights`: what a rank reads of the block without it."""
    return min(fits, key=lambda f: f.left + exchange * f.form.weights(d_rank, d) / block_weights)


def _ridge(m: Moments, o_missing: Tensor, own: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """W [d_rank, d] = (C_SS + r I)^-1 C_S. o_missing, and the Cholesky factor of C_SS + r I."""
    c = m.covariance[own][:, own]
    c = c + (ridge * c.diagonal().mean() + 1e-12) * torch.eye(len(own), dtype=c.dtype, device=c.device)
    root = torch.linalg.cholesky(c)
    return torch.cholesky_solve(m.covariance[own] @ o_missing, root), root


def _project(w: Tensor, root: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """W projected on the k directions in which its predictions vary most: A [d_rank, k], B [k, d]."""
    v = torch.linalg.svd(root.T @ w, full_matrices=False).Vh[:k]
    return w @ v.T, v


def _energy(m: Moments, matrix: Tensor) -> float:
    """E |z matrix|^2."""
    return (torch.einsum("id,id->", matrix, m.covariance @ matrix) + (m.mean @ matrix).square().sum()).item()


def _left(m: Moments, o_missing: Tensor, own: Tensor, slope: Tensor | None, bias: Tensor) -> float:
    """E |m - z_S slope - bias|^2."""
    matrix = o_missing
    if slope is not None:
        matrix = o_missing.clone()
        matrix[own] -= slope
    spread = torch.einsum("id,id->", matrix, m.covariance @ matrix)
    return (spread + (m.mean @ matrix - bias).square().sum()).item()


def _predictor(form: Form, bias: Tensor, a: Tensor | None, b: Tensor | None, o_own: Tensor) -> Compensation:
    if form.kind == "full":
        assert a is not None
        return Compensation(bias.clone(), w=o_own + a)
    if form.kind == "low_rank":
        return Compensation(bias.clone(), a=a, b=b)
    return Compensation(bias.clone())
