"""Second-order predictions, corrected by what was measured of some of the sync points.

Second order leaves out how the later blocks answer to a large change. Its error is a factor that differs from sync
point to sync point: on stories260k from 0.46 to 1. A few sequences on which a sync point is really dropped give an
estimate of its factor, with an error of its own. Let P_i be the KL predicted on all sequences, and M_i the KL measured
on n_i of them, divided by how much harder these n_i are than all of them, according to the predictions. The
random-effects model is

    log M_i / P_i ~ N(mu + b_i, s^2 + v_i),    b_i ~ N(0, tau^2)

where s^2 is the relative variance of P_i that is due to the random signs, and v_i that of M_i, due to the sequences it
was not measured on. tau^2 is estimated by DerSimonian and Laird's method of moments ("Meta-analysis in clinical
trials", 1986). The corrected log KL_i is the mean of log P_i + mu and log M_i, each weighted by the inverse of its
variance; for a sync point that was not measured it is log P_i + mu.
"""

import torch
from torch import Tensor

from .metrics import Tally
from .predictions import FIELDS

BROKEN = 0.2  # KL, nats per token, beyond which second order says nothing of a sync point, nor it of the others
NOISE = 1e-6  # KL below which float32 rounds away what a ratio would tell
MeasuredDrops = dict[tuple[int, int], Tally]  # by the sync point's index, and the first sequence it was dropped on


def factors(q: Tensor, tokens: Tensor, measured: MeasuredDrops, *, sampling_error: float) -> tuple[Tensor, Tensor]:
    """Return the factor that corrects each sync point's predicted KL, and the relative variance that remains.

    Both are [points] float64; the variance is without the random signs' share. q [sequences, points] is the KL
    predicted, summed over each sequence's tokens, tokens [sequences] their number, `sampling_error` the s above.
    Returns ones and zeros where too little was measured to tell: it takes two sync points between NOISE and BROKEN,
    measured on two sequences each.
    """
    predicted = q.sum(0) / tokens.sum()
    result, left = torch.ones_like(predicted), torch.zeros_like(predicted)
    some = predicted > NOISE
    index, ratios, shares, spreads, trusted = [], [], [], [], []
    for i, (rows, tally) in sorted(joined(measured).items()):
        kl = tally.kl()
        if len(rows) > 1 and kl > NOISE and some[i]:
            harder = (q[rows].sum(0)[some] / tokens[rows].sum() / predicted[some]).mean().item()
            of_sequence = torch.stack(tally.sums)[:, FIELDS.index("kl")] / torch.tensor(tally.tokens)
            index.append(i)
            ratios.append(kl / harder / predicted[i].item())
            shares.append((1 - len(rows) / len(q)) / len(rows))
            spreads.append((of_sequence.var() / kl**2).item())
            trusted.append(kl <= BROKEN)
    if sum(trusted) < 2:
        return result, left
    usable = torch.tensor(trusted)
    ratio = torch.tensor(ratios, dtype=torch.float64).log()
    v = torch.tensor(spreads, dtype=torch.float64)[usable].median() * torch.tensor(shares, dtype=torch.float64)
    mu, tau2 = random_effects(ratio[usable], v[usable] + sampling_error**2)
    own, prior = 1 / v.clamp(min=1e-12), 1 / (sampling_error**2 + tau2)
    result[predicted <= BROKEN] = mu.exp()
    left[predicted <= BROKEN] = tau2
    result[index] = torch.where(usable, (own * ratio + prior * mu) / (own + prior), ratio).exp()
    left[index] = torch.where(usable, 1 / (own + 1 / tau2), 1 / own)
    return result, left


def joined(measured: MeasuredDrops) -> dict[int, tuple[list[int], Tally]]:
    """Return, by sync point, the sequences it was dropped on, and what was measured on all of them."""
    found: dict[int, tuple[list[int], Tally]] = {}
    for (point, first), tally in measured.items():
        rows, whole = found.setdefault(point, ([], Tally()))
        rows += range(first, first + len(tally.tokens))
        whole.add(tally)
    return found


def random_effects(ratio: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Return mu and tau^2 of the log ratios `ratio` [k], each known up to its own `variance` [k]."""
    w = 1 / variance
    q = (w * (ratio - (w * ratio).sum() / w.sum()) ** 2).sum()
    tau2 = ((q - (len(w) - 1)) / (w.sum() - (w**2).sum() / w.sum())).clamp(min=0)
    w = 1 / (variance + tau2)
    return (w * ratio).sum() / w.sum(), tau2
