"""Fitting predictors where the attention's output goes through a norm A before it joins the residual stream.

What joins is not linear in the partial sums, so the moments of head outputs do not tell it (predictor_fit.py); these
are of what each rank has, its head outputs z and its share e = A(partial + bias), and of what its MLP should read
beside its stream, t: what the MLP reads in the dense model, less what the rank's stream holds before. Fitted is

    t = scale * e + z W + bias,    scale channel by channel, W by ridge regression

in one go: with the ridge r, C = cov(z) + r I and K = C^-1, the least squares scale of channel c is
(cov(t, e) - cov(t, z) K cov(z, e))_cc / (var(e) - cov(e, z) K cov(z, e))_cc, and W = K cov(z, t - scale e). Without z
that is a line in each channel. Tokens are weighed by 1 / |h|^2, h what the dense MLP reads, for the norm that reads it,
and by what errors there cost.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spd_calib.models.predictor import Predictor

from .error_cost import ErrorCost
from .feed import Batch, Feed
from .moments import widened
from .predictor_fit import RIDGES, Fit, PredictorForm, project
from .refit import weights_of_reads
from .student import Student


@dataclass
class RankMoments:
    """Weighted sums over tokens of one rank's z [p], e and t [d], float64; centred by `covariances`."""

    weight: float = 0.0
    z: Tensor = field(default_factory=lambda: torch.zeros(()))
    e: Tensor = field(default_factory=lambda: torch.zeros(()))
    t: Tensor = field(default_factory=lambda: torch.zeros(()))
    zz: Tensor = field(default_factory=lambda: torch.zeros(()))
    ze: Tensor = field(default_factory=lambda: torch.zeros(()))
    zt: Tensor = field(default_factory=lambda: torch.zeros(()))
    ee: Tensor = field(default_factory=lambda: torch.zeros(()))
    et: Tensor = field(default_factory=lambda: torch.zeros(()))
    tt: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, z: Tensor, e: Tensor, t: Tensor, *, weights: Tensor) -> None:
        """Add tokens: z [N, p], e and t [N, d], each token with a weight [N]."""
        z, e, t = map(widened, (z, e, t))
        w = weights[:, None]
        self.weight += weights.double().sum().item()
        self.z, self.e, self.t = (old + (w * x).sum(0).double() for old, x in ((self.z, z), (self.e, e), (self.t, t)))
        zw = (z * w).T
        self.zz, self.ze, self.zt = (old + (zw @ x).double() for old, x in ((self.zz, z), (self.ze, e), (self.zt, t)))
        self.ee, self.et, self.tt = (
            old + (w * x * y).sum(0).double() for old, x, y in ((self.ee, e, e), (self.et, e, t), (self.tt, t, t))
        )

    def centred(self) -> "RankMoments":
        """Return means in place of the sums, and (co)variances in place of the sums of products; of weight 1."""
        n = self.weight
        z, e, t = self.z / n, self.e / n, self.t / n
        return RankMoments(
            1.0,
            z=z,
            e=e,
            t=t,
            zz=self.zz / n - torch.outer(z, z),
            ze=self.ze / n - torch.outer(z, e),
            zt=self.zt / n - torch.outer(z, t),
            ee=self.ee / n - e * e,
            et=self.et / n - e * t,
            tt=self.tt / n - t * t,
        )

    def left(self, scale: Tensor, w: Tensor | None, bias: Tensor) -> float:
        """Return E |t - scale e - z W - bias|^2; of centred moments."""
        spread = self.tt + scale * (scale * self.ee - 2 * self.et)
        off = self.t - scale * self.e - bias
        if w is not None:
            spread = spread + (w * (self.zz @ w - 2 * self.zt + 2 * scale * self.ze)).sum(0)
            off = off - self.z @ w
        return (spread + off.square()).sum().item()


@torch.no_grad()
def rank_moments(
    student: Student, feed: Feed, batches: Iterable[Batch], *, cost: ErrorCost | None = None
) -> list[RankMoments]:
    """Return the centred moments of every rank, over the real tokens of some of the feed's batches."""
    block = student.block
    found = [RankMoments() for _ in range(block.comm.size)]
    for batch in batches:
        s, h, y = feed.inputs(batch), feed.dense_read(batch), feed.dense_output(batch)
        partials, heads = block.attend(s, **feed.kwargs(batch))
        if more := block.attend_replicated(student.drops.at(block.attention_point), s, **feed.kwargs(batch)):
            partials, heads = more.beside(partials), more.heads_beside(heads)
        should, costs = h[batch.mask], weights_of_reads(cost, batch, output=y, part=y - h)
        weights = costs / should.square().mean(-1).clamp(min=1e-12)
        for rank, of_rank in enumerate(found):
            share = block.attention_branch(partials[rank])[batch.mask]
            of_rank.add(heads[rank][batch.mask], share, should - s.read(rank)[batch.mask], weights=weights)
    return [of_rank.centred() for of_rank in found]


def fit_behind_norm(
    student: Student, feed: Feed, *, forms: Sequence[PredictorForm], cost: ErrorCost | None = None
) -> list[Fit]:
    """Fit scaled predictors of each form for every rank of a block; the ridge is chosen for each form and rank.

    `left` of what is returned is the share of E |t - e|^2 that they leave, on the tokens to choose by.
    """
    fitting, choosing = (rank_moments(student, feed, part, cost=cost) for part in (feed.fitting, feed.choosing))
    missed = sum(m.left(torch.ones_like(m.e), None, torch.zeros_like(m.e)) for m in choosing)
    rows = [_fit_rank(*of_rank, forms=forms) for of_rank in zip(fitting, choosing, strict=True)]
    dtype = student.parts.o.weight.dtype
    return [
        Fit(
            form,
            {rank: row[form][0].to(dtype) for rank, row in enumerate(rows)},
            sum(row[form][1] for row in rows) / max(missed, 1e-30),
        )
        for form in forms
    ]


def _fit_rank(
    fitting: RankMoments, choosing: RankMoments, *, forms: Sequence[PredictorForm]
) -> dict[PredictorForm, tuple[Predictor, float]]:
    """Return one rank's predictor of each form, and the mean square of what it leaves."""
    m = fitting
    found: dict[PredictorForm, tuple[Predictor, float]] = {}
    regressions = [] if all(f.kind == "mean" for f in forms) else [_ridge(m, ridge) for ridge in RIDGES]
    for form in forms:
        tried: list[tuple[float, Predictor]] = []
        if form.kind == "mean":
            scale = m.et / m.ee.clamp(min=1e-12)
            bias = m.t - scale * m.e
            tried.append((choosing.left(scale, None, bias), Predictor(bias, scale=scale)))
        for scale, w, root in regressions if form.kind != "mean" else ():
            a, b = project(w, root, form.rank) if form.kind == "low_rank" else (w, None)
            slope = a if b is None else a @ b
            bias = m.t - scale * m.e - m.z @ slope
            predictor = Predictor(bias, scale=scale, **({"w": a} if b is None else {"a": a, "b": b}))
            tried.append((choosing.left(scale, slope, bias), predictor))
        left, predictor = min(tried, key=lambda t: t[0])
        found[form] = predictor, left
    return found


def _ridge(m: RankMoments, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return scale [d], W [p, d], and the Cholesky factor of cov(z) + r I."""
    c = m.zz + (ridge * m.zz.diagonal().mean() + 1e-12) * torch.eye(len(m.zz), dtype=m.zz.dtype, device=m.zz.device)
    root = torch.linalg.cholesky(c)
    of_e, of_t = (torch.cholesky_solve(x, root) for x in (m.ze, m.zt))
    scale = (m.et - (m.zt * of_e).sum(0)) / (m.ee - (m.ze * of_e).sum(0)).clamp(min=1e-12)
    return scale, of_t - scale * of_e, root
