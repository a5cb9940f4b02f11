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
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from spd_calib.errors import InputError
from spd_calib.formats.drops import SUBLAYERS, Drops, Point, Strategy, Sublayer
from spd_calib.formats.profile import Baseline, Fisher, MeasuredPoint
from spd_calib.parallel.block import Block
from spd_calib.parallel.model import Recording, TensorParallelLM
from spd_calib.parallel.streams import Streams, defer, keep

from .correction import BROKEN, MeasuredDrops, factors, joined
from .journal import Journal, once
from .measure import LOGITS_AT_A_TIME, Reference, batches
from .metrics import Tally
from .standard_error import ratio_and_stderr

DRAWS = 2  # sync points really dropped on each batch
Term = tuple[Point, ...]  # one sync point, or two consecutive ones: what they change beyond their sum


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
    """What to compute on a batch: drop the points `drawn`, and score all `terms` with `samples` draws of signs."""

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
        tallies = [reference.compare(final) for final in finals]
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
            "dense": (reference.compare(recording.final) if self.first else Tally()).state(),
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


@dataclass(frozen=True)
class _Passed:
    """A block run with every sync point kept: the stream behind each of the two, and the gradients there.

    mid (behind the attention's) and out (behind the MLP's) are [B, T, d], the gradients [samples, B, T, d].
    """

    block: Block
    kwargs: dict
    mid: Tensor
    out: Tensor
    grad_mid: Tensor
    grad_out: Tensor


def score(
    lm: TensorParallelLM,
    recording: Recording,
    *,
    lengths: Sequence[int],
    sync_points: Collection[Sublayer],
    samples: int,
    generator: torch.Generator,
    dropped: Tensor | None = None,
) -> dict[Term, Tensor]:
    """Return d of every term, [samples, B], for one recorded batch.

    The blocks are run once more from what entered them, from the last backwards; no more than two blocks' activations
    are held beside the recording. `dropped` [B, T, d] is what left the final norm with some sync point dropped;
    without it F is the dense model's alone.
    """
    d: dict[Term, Tensor] = {}
    gradient = final_gradient(
        lm, recording.final, lengths=lengths, samples=samples, generator=generator, dropped=dropped
    )
    following: _Passed | None = None
    for block, entered, kwargs in reversed(list(zip(lm.blocks, recording.streams, recording.kwargs, strict=True))):
        x = entered.shared.detach().requires_grad_()
        with torch.enable_grad():
            attended = block.attend(Streams(x), **kwargs)[0]
            mid = keep(Streams(x), attended, block.o_bias, lm.comm)
            fed = block.feed(mid)
            out = keep(mid, fed, block.down_bias, lm.comm).shared
            if following is None:
                left = out.detach().requires_grad_()
                gradient = backward(lm.final_norm(Streams(left)), [left], gradient)[0]
        grad_mid, grad_in = backward(out, [mid.shared, x], gradient)
        passed = _Passed(block, kwargs, mid.shared.detach(), out.detach(), grad_mid, gradient)
        with torch.no_grad():
            attended, fed = [a.detach() for a in attended], [f.detach() for f in fed]
            _drop(d, passed, following, x.detach(), attended, fed, "mlp" in sync_points)
        following, gradient = passed, grad_in
    return d


def _drop(
    d: dict[Term, Tensor],
    here: _Passed,
    following: _Passed | None,
    x: Tensor,
    attended: list[Tensor],
    fed: list[Tensor],
    with_mlp: bool,
) -> None:
    """Add to `d` the terms of a block: its attention's and, `with_mlp`, its MLP's and those of consecutive pairs.

    x entered the block; `attended` and `fed` are the ranks' partial sums with every sync point kept. The last block
    (nothing `following`) has the term of its attention alone.
    """
    block, comm = here.block, here.block.comm
    attention = block.attention_point
    owed_by_attention = defer(Streams(x), attended, block.o_bias)
    fed_by_own = block.feed(owed_by_attention)
    settled = keep(owed_by_attention, fed_by_own, block.down_bias, comm)
    d[(attention,)] = _dot(here.grad_out, settled.shared - here.out)
    if not with_mlp or following is None:
        return
    mlp = block.mlp_point
    next_attention = following.block.attention_point
    after = following.block
    owed_by_mlp = defer(Streams(here.mid), fed, block.down_bias)
    attended = after.attend(owed_by_mlp, **following.kwargs)[0]
    settled = keep(owed_by_mlp, attended, after.o_bias, comm)
    d[(mlp,)] = _dot(following.grad_mid, settled.shared - following.mid)

    owed = defer(owed_by_mlp, attended, after.o_bias)
    settled = keep(owed, after.feed(owed), after.down_bias, comm)
    together = _dot(following.grad_out, settled.shared - following.out)
    d[(mlp, next_attention)] = together - d[(mlp,)] - d[(next_attention,)]

    owed = defer(owed_by_attention, fed_by_own, block.down_bias)
    settled = keep(owed, after.attend(owed, **following.kwargs)[0], after.o_bias, comm)
    together = _dot(following.grad_mid, settled.shared - following.mid)
    d[(attention, mlp)] = together - d[(attention,)] - d[(mlp,)]


def _dot(gradients: Tensor, change: Tensor) -> Tensor:
    """Return <gradients, change> for gradients [samples, B, T, d] and a change [B, T, d], summed over T and d."""
    return torch.einsum("sbtd,btd->sb", gradients.float(), change.float())


def backward(output: Tensor, inputs: list[Tensor], gradients: Tensor) -> list[Tensor]:
    """Return the gradients of <gradients[s], output> with respect to `inputs`: one [samples, *shape] for each input."""
    last = len(gradients) - 1
    found = [torch.autograd.grad(output, inputs, g, retain_graph=s < last) for s, g in enumerate(gradients)]
    return [torch.stack(of_input) for of_input in zip(*found, strict=True)]


def final_gradient(
    lm: TensorParallelLM,
    final: Tensor,
    *,
    lengths: Sequence[int],
    samples: int,
    generator: torch.Generator,
    dropped: Tensor | None,
) -> Tensor:
    """Return the gradient [samples, B, T, d] of sum_t <s_t, z_t> with respect to `final` [B, T, d].

    `final` is what left the dense model's final norm; `dropped` as in score. The sum is over the tokens that
    predict another: not the last one of a sequence, and not its padding.
    """
    positions = (torch.arange(final.shape[1]) < torch.tensor(lengths)[:, None] - 1).to(final.device)
    gradient = final.new_zeros(samples, *final.shape)
    step = max(1, LOGITS_AT_A_TIME // lm.head.vocab_size)
    found = []
    for hidden, end in zip(
        final[positions].split(step), (final if dropped is None else dropped)[positions].split(step), strict=True
    ):
        hidden = hidden.detach().requires_grad_()
        with torch.enable_grad():
            logits = lm.logits_with_gradients(hidden[None])[0]
        p, q = (z.detach().float().softmax(-1) for z in (logits, lm.logits(end[None])[0]))
        scores = []
        for _ in range(samples):
            at_end = torch.rand(len(p), 1, generator=generator, device=p.device) < 1 / 3
            scores.append(_signed_root(torch.where(at_end, q, p), generator))
        found.append(backward(logits, [hidden], torch.stack(scores).to(logits.dtype))[0])
    gradient[:, positions] = torch.cat(found, dim=1)
    return gradient


def _signed_root(p: Tensor, generator: torch.Generator) -> Tensor:
    """Return A e [N, V] for probabilities p [N, V] and random signs e: sqrt(p) e - p <sqrt(p), e>."""
    signs = torch.randint(0, 2, p.shape, generator=generator, device=p.device, dtype=torch.int8) * 2 - 1
    root = p.sqrt() * signs
    return root - p * root.sum(-1, keepdim=True)


def _short(value: Tensor | float) -> float:
    """Round to six digits: a file of many entries stays readable and small."""
    return float(f"{float(value):.6g}")
