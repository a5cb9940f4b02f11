"""Ridge regression from second moments: whatever the number of tokens, only products of features and targets are held.

The fit is of a change: a weight that the text says nothing about stays what it was. The ridge is chosen by the error on
tokens that took no part in the fit, which follows from their moments alone.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .moments import widened

# relative to the mean diagonal of the features' products
RIDGES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0, 30.0, 100.0)


@dataclass
class Products:
    """Sums over tokens of X^T X [p, p], X^T Y [p, q] and Y^T Y [q, q], float64, for features X and targets Y.

    Empty until something is added. Products of one batch are made in float32, or in float64 of such features.
    """

    xx: Tensor = field(default_factory=lambda: torch.zeros(()))
    xy: Tensor = field(default_factory=lambda: torch.zeros(()))
    yy: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, x: Tensor, y: Tensor, *, weights: Tensor | None = None) -> None:
        """Add tokens: x [N, p], y [N, q], each token with a weight [N], by default 1."""
        x, y = map(widened, (x, y))
        weighted_x, weighted_y = (x, y) if weights is None else (x * weights[:, None], y * weights[:, None])
        self.xx = self.xx + (weighted_x.T @ x).double()
        self.xy = self.xy + (weighted_x.T @ y).double()
        self.yy = self.yy + (weighted_y.T @ y).double()

    def error(self, metric: Tensor | None = None) -> float:
        """Return the sum of Y metric Y^T over tokens; no metric: I."""
        return (self.yy.diagonal().sum() if metric is None else (self.yy * metric).sum()).item()


@dataclass(frozen=True)
class RidgeFit:
    """The change [p, q] with the least error on the tokens to choose by, its ridge, and the share of the error left."""

    change: Tensor
    ridge: float
    left: float

    def detail(self) -> dict:
        """Return what the report says of it."""
        return {"ridge": self.ridge, "left": self.left}


class Ridge:
    """The ridge regressions of `fitting`, the ridge chosen on `choosing`: one eigendecomposition for any number.

    In the eigenvectors of X^T X a ridge only scales the rows of V^T X^T Y, by 1 / (value + ridge): so the error on the
    tokens to choose by is a quadratic form in these p numbers.
    """

    def __init__(self, fitting: Products, choosing: Products):
        self.choosing = choosing
        values, self._vectors = torch.linalg.eigh(fitting.xx)
        self._values = values.clamp(min=0)
        self._scale = fitting.xx.diagonal().mean().clamp(min=1e-30)
        self._rotated = self._vectors.T @ fitting.xy
        self._chosen_xx = self._vectors.T @ choosing.xx @ self._vectors
        self._chosen_xy = self._vectors.T @ choosing.xy

    def best(self, metric: Tensor | None = None) -> RidgeFit | None:
        """Return the fit with the least error in `metric` [q, q]; None where none is better than no change."""
        weighted = self._rotated if metric is None else self._rotated @ metric
        linear = (self._chosen_xy * weighted).sum(1)
        quadratic = self._chosen_xx * (weighted @ self._rotated.T)
        untouched, tried = self.choosing.error(metric), []
        for ridge in RIDGES:
            by = self._factors(ridge)
            tried.append((untouched - 2 * (by @ linear).item() + (by @ (quadratic @ by)).item(), ridge))
        error, ridge = min(tried)
        return RidgeFit(self.change(ridge), ridge, error / untouched) if error < untouched else None

    def change(self, ridge: float) -> Tensor:
        """Return (X^T X + ridge mean(diagonal) I)^-1 X^T Y."""
        return self._vectors @ (self._factors(ridge)[:, None] * self._rotated)

    def _factors(self, ridge: float) -> Tensor:
        return 1 / (self._values + ridge * self._scale)
