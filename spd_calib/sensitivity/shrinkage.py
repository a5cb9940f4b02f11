"""What second order predicts, put right by what was measured of it.

Second order leaves out how the later blocks answer to a large change, and is off by a factor of its own for every sync
point: on stories260k by 0.46 to 1. A few sequences on which the sync point is really dropped tell that factor, though
not exactly. With P_i what is predicted on all sequences, and M_i what was measured on n_i of them, divided by how much
harder those are than all by the predictions, the random-effects model is

    log M_i / P_i ~ N(mu + b_i, s^2 + v_i),    b_i ~ N(0, tau^2)

s^2: relative variance of P_i by the random signs; v_i: of M_i, by the sequences it was not measured on. tau^2 is
DerSimonian and Laird's estimate by moments ("Meta-analysis in clinical trials", 1986). log KL_i is the mean of
log P_i + mu and log M_i, each weighted by the inverse of its variance; what was not measured is P_i exp(mu).
"""

import torch
from torch import Tensor

from .metrics import FIELDS, Tally

BROKEN = 0.2  # KL, nats per token, beyond which second order says nothing of a sync point, nor it of the others
NOISE = 1e-6  # KL below which float32 rounds away what a ratio would tell
Dropped = dict[tuple[int, int], Tally]  # sync points really dropped: by index, and the first sequence it was on


def factors(q: Tensor, tokens: Tensor, measured: Dropped, sampling_error: float) -> tuple[Tensor, Tensor]:
    """By what the predicted KL of each sync point is to be multiplied, and the relative variance that is left beyond
    the random signs'; both [points] float64.

    q [sequences, points]: KL predicted, summed over each sequence's tokens; tokens [sequences]; `sampling_error` s.
    Ones and zeros where too little was measured to tell: it takes two sync points between NOISE and BROKEN, of two
    sequences each.
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


def joined(measured: Dropped) -> dict[int, tuple[list[int], Tally]]:
    """By sync point: the sequences it was dropped on, and what was measured on all of them."""
    found: dict[int, tuple[list[int], Tally]] = {}
    for (point, first), tally in measured.items():
        rows, whole = found.setdefault(point, ([], Tally()))
        rows += range(first, first + len(tally.tokens))
        whole.add(tally)
    return found


def random_effects(ratio: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """mu and tau^2 of `ratio` [k], each known up to its own `variance` [k]."""
    w = 1 / variance
    q = (w * (ratio - (w * ratio).sum() / w.sum()) ** 2).sum()
    tau2 = ((q - (len(w) - 1)) / (w.sum() - (w**2).sum() / w.sum())).clamp(min=0)
    w = 1 / (variance + tau2)
    return (w * ratio).sum() / w.sum(), tau2
