"""Predicting every sync point's KL and all their interactions from one forward and one backward pass a batch.

To second order, a change dz_t of the logits of token t costs KL = 1/2 dz_t' F_t dz_t, where F_t = diag(p) - p p' is
the Fisher matrix of the softmax. With A = diag(sqrt p) - p sqrt(p)', A A' = F; so for random signs e the score
s_t = A e has covariance F_t, and independent signs at different tokens make their cross terms vanish:

    g = gradient of sum_t <s_t, z_t> with respect to the residual stream
    d_i = <g, change of the stream that dropping sync point i makes>, summed over a sequence
    KL of a sequence, every sync point of S dropped = 1/2 E[(sum_{i in S} d_i)^2]

(Labels sampled from the model in place of signs would do; signs have lighter tails.) The change is computed exactly up
to the sync point that settles the debt, and linearly from there on. The change made by a set is then the sum of its
members' changes, with one exception: the debts of two consecutive sync points add up before they are settled. So each
consecutive pair is run, too, and what it changes beyond the sum of its two members is a term of its own.

F_t at the dense model alone is too small where the dense model is certain and the planned one is not. Exactly, KL is
the integral of (1 - s) dz' F(z + s dz) dz over s from 0 to 1; with F linear in s that is 2/3 of F at the dense model
and 1/3 of F at the planned one. Every sync point has a planned model of its own; one, drawn for each batch, is used for
all of them, since the tokens that one drop makes uncertain are mostly those that other drops do. A drop that costs more
than BROKEN is not used for this.

On each batch DRAWS sync points are really dropped: the first serves as that planned model, and the measured costs of
all of them correct the predictions (correction.py). They are drawn in turn: none is measured twice before every other
was measured once.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from spd_calib.errors import InputError
from spd_calib.formats.drops import SUBLAYERS, Drops, Point, Strategy, Sublayer
from spd_calib.formats.profile import Baseline, Fisher, MeasuredPoint
from spd_calib.parallel.model import TensorParallelLM

from .correction import BROKEN, MeasuredDrops, factors, joined
from .journal import Journal, once
from .measure import batches
from .metrics import Tally
from .reference import Reference
from .scores import Term, score
from .standard_error import ratio_and_stderr

DRAWS = 2  # sync points really dropped on each batch


def fisher_terms(num_blocks: int, sync_points: Sequence[Sublayer]) -> list[Term]:
    """Return the sync points in the order in which the model meets them, then the consecutive pairs of both kinds."""
    points = [Point(block, sublayer) for block in range(num_blocks) for sublayer in SUBLAYERS][:-1]
    terms: list[Term] = [(p,) for p in points if p.sync_point in sync_points]
    return terms + (list(itertools.pairwise(points)) if len(set(sync_points)) == 2 else [])


def predict(
    lm: TensorParallelLM,
    sequences: Sequence[Sequence[int]],
    *,
    sync_points: Sequence[Sublayer],
    target_stderr: float,
    batch_size: int = 8,
    seed: int = 0,
    tick: Callable[[], None] | None = None,
    journal: Journal | None = None,
) -> tuple[Baseline, Fisher]:
    """Return the dense model's baseline and the interactions of all sync points, block_drop at each.

    Signs are drawn until their share of the relative standard error, averaged over the sync points, is at most
    `target_stderr`. With Gaussian d that share is sqrt(2 / (sequences * samples)) if all sequences weigh the same: the
    first pass draws as many samples as that takes, further passes what the error then found still takes. `tick` is
    called after each batch. What `journal` holds, by pass and batch, is not run again. Raises InputError where no sync
    point is left to drop, and, naming the block, where NaN or Inf appears.
    """
    generator = torch.Generator(lm.device).manual_seed(seed)
    terms = fisher_terms(lm.num_blocks, sync_points)
    points = [term[0] for term in terms if len(term) == 1]
    if not points:
        raise InputError("There is no such sync point to drop: behind the last block's MLP nothing follows.")
    tokens = torch.tensor([len(s) - 1 for s in sequences], dtype=torch.float64)
    samples = first_samples(len(sequences), target_stderr)
    in_turn = _in_turn(len(points), seed)
    dense, measured, passes = Tally(), MeasuredDrops(), list[Tensor]()
    while samples > 0:
        scores = []
        for number, (input_ids, lengths) in enumerate(batches(sequences, batch_size, lm.device)):
            drawn = list(dict.fromkeys(itertools.islice(in_turn, DRAWS)))
            batch = _BatchOfPass(lm, terms, drawn=[points[i] for i in drawn], samples=samples, first=not passes)
            found = once(journal, (len(passes), number), partial(batch.run, input_ids, lengths, generator=generator))
            generator.set_state(torch.tensor(list(bytes.fromhex(found["generator"])), dtype=torch.uint8))
            dense.add(Tally.of_state(found["dense"]))
            for i, state in zip(drawn, found["dropped"], strict=True):
                measured[i, number * batch_size] = Tally.of_state(state)
            scores.append(torch.tensor(found["scores"], dtype=torch.float64))
            if tick is not None:
                tick()
        passes.append(torch.cat(scores, dim=1))
        d = torch.cat(passes)  # [samples, sequences, terms]
        error = sampling_error(d[..., : len(points)])
        samples = math.ceil(len(d) * (error**2 / target_stderr**2 - 1) - 0.01)
    q = d[..., : len(points)].pow(2).mean(0) / 2
    factor, left = factors(q, tokens, measured, sampling_error=error)
    of_point = dict(zip(points, factor.sqrt().tolist(), strict=True))
    scale = torch.tensor([math.prod(of_point[p] for p in t) ** (1 / len(t)) for t in terms]).double()
    matrix, stderr = (m * scale[:, None] * scale for m in interactions(d, tokens))
    own = range(len(points))
    stderr[own, own] = (stderr[own, own] ** 2 + matrix[own, own] ** 2 * left).sqrt()
    rows = range(len(terms))
    return dense.baseline(), Fisher(
        terms=[list(term) for term in terms],
        matrix=[[_short(matrix[i, j]) for j in rows[i:]] for i in rows],
        stderr=[[_short(stderr[i, j]) for j in rows[i:]] for i in rows] if len(sequences) > 1 else None,
        samples=len(d),
        sampling_error=_short(error),
        measured=_measured(points, measured, q.sum(0) / tokens.sum()),
    )


@dataclass(frozen=True)
class _BatchOfPass:
    """The work on one batch: drop the points `drawn`, and score all `terms` with `samples` draws of signs."""

    lm: TensorParallelLM
    terms: Sequence[Term]
    drawn: Sequence[Point]
    samples: int
    first: bool  # the first pass measures the dense model, too

    def run(self, input_ids: Tensor, lengths: list[int], *, generator: torch.Generator) -> dict:
        """Return scores, tallies and the generator's state afterwards, as JSON values."""
        recording = self.lm.record(input_ids)
        reference = Reference(self.lm, recording.final, input_ids=input_ids, lengths=lengths)
        finals = [self.lm.resume(recording, block_drop_of(point)) for point in self.drawn]
        tallies = reference.compare([reference.streams(final) for final in finals])
        by_term = score(
            self.lm,
            recording,
            lengths=lengths,
            sync_points={point.sync_point for term in self.terms for point in term},
            samples=self.samples,
            generator=generator,
            dropped=finals[0] if tallies[0].kl() <= BROKEN else None,
        )
        d = torch.stack([by_term[term] for term in self.terms], dim=-1).double()
        return {
            "scores": d.tolist(),
            "dense": (reference.tally() if self.first else Tally()).state(),
            "dropped": [tally.state() for tally in tallies],
            "generator": generator.get_state().numpy().tobytes().hex(),
        }


def block_drop_of(point: Point) -> Drops:
    """Return the drops of one sync point alone, by block_drop."""
    return Drops.of({point: Strategy.BLOCK_DROP})


def _in_turn(points: int, seed: int) -> Iterator[int]:
    """Yield indices of sync points without end: all in a random order, then all in another, and so on."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(points, generator=generator).tolist()


def _measured(points: Sequence[Point], measured: MeasuredDrops, predicted: Tensor) -> list[MeasuredPoint]:
    rows = []
    for i, (_, tally) in sorted(joined(measured).items()):
        found = tally.comparison()
        rows.append(
            MeasuredPoint(
                point=points[i],
                kl=_short(found.kl),
                kl_stderr=None if found.kl_stderr is None else _short(found.kl_stderr),
                sequences=found.sequences,
                second_order=_short(predicted[i]),
            )
        )
    return rows


def first_samples(sequences: int, target_stderr: float) -> int:
    """Return how many samples of signs a sequence needs for `target_stderr`, if all sequences weigh the same."""
    return math.ceil(2 / (sequences * target_stderr**2))


def interactions(d: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the matrix 1/2 E[d_i d_j] per token and its standard error over sequences, both [terms, terms].

    d [samples, sequences, terms], tokens [sequences]. The error of one sequence alone, which is unknown, is given as 0.
    """
    q = torch.einsum("sni,snj->nij", d, d) / (2 * len(d))  # summed over each sequence's tokens
    mean, stderr = ratio_and_stderr(q, tokens)
    return mean, torch.zeros_like(mean) if stderr is None else stderr


def sampling_error(d: Tensor) -> float:
    """Return the relative standard error of 1/2 E[d_i^2] that is due to the signs alone, averaged over the terms of d.

    For Gaussian d, Var(d^2) = 2 E[d^2]^2 = 2/3 E[d^4]; sums of signs have lighter tails than that.
    """
    variance = (2 / 3) * d.pow(4).sum((0, 1))
    return (variance.sqrt() / d.pow(2).sum((0, 1)).clamp(min=1e-300)).mean().item()


def _short(value: Tensor | float) -> float:
    """Round to six digits: a file of many entries stays readable and small."""
    return float(f"{float(value):.6g}")
