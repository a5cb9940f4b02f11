"""Every sync point's KL and all their interactions from one forward and one backward pass a batch.

To second order, a change dz_t of the logits of token t costs KL = 1/2 dz_t' F_t dz_t, where F_t = diag(p) - p p' is
the Fisher matrix of the softmax. With A = diag(sqrt p) - p sqrt(p)', A A' = F; so for random signs e the score
s_t = A e has covariance F_t, and independent signs at different tokens make their cross terms vanish:

    g = gradient of sum_t <s_t, z_t> with respect to the residual stream
    d_i = <g, change of the stream that dropping sync point i makes>, summed over a sequence
    KL of a sequence, every sync point of S dropped = 1/2 E[(sum_{i in S} d_i)^2]

(labels sampled from the model in place of signs would do; signs have lighter tails.) The change is exact as far as
the sync point that settles the debt, and linear from there on. A set is the sum of its members but for one thing:
the debts of two consecutive sync points add up before they are settled. So each consecutive pair is run, too, and
what it does beyond its two members is a term of its own.

F_t at the dense model alone is too small where the dense model is sure and the dropped one is not. Exactly, KL is the
integral of (1 - s) dz' F(z + s dz) dz over s from 0 to 1; with F linear in s that is 2/3 of F at the start and 1/3 at
the end. Every sync point has an end of its own; one, drawn for each batch, stands for all: tokens that one drop
unsettles are the ones that others do. A drop that costs more than BROKEN leaves no such end, and is not used.

On each batch DRAWS sync points are really dropped: the first is that end, and what all of them cost puts the
predictions right (shrinkage.py). They are drawn in turn, so that none is measured twice before all were once.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spd_calib.errors import InputError
from spd_calib.formats.common import Strategy
from spd_calib.formats.profile import Baseline, Fisher, MeasuredPoint, Point, SyncPoint
from spd_calib.parallel.block import Block
from spd_calib.parallel.model import Recording, TensorParallelLM
from spd_calib.parallel.streams import Streams, defer, keep

from .journal import Journal, OfText, once
from .measure import LOGITS_AT_A_TIME, Experiment, Reference, batches
from .metrics import Tally
from .shrinkage import BROKEN, Dropped, factors, joined

DRAWS = 2  # sync points really dropped on each batch
KINDS: tuple[SyncPoint, SyncPoint] = ("attention", "mlp")
Term = tuple[Point, ...]  # one sync point, or two consecutive ones: what they do beyond their sum


def fisher_terms(num_blocks: int, sync_points: Sequence[SyncPoint]) -> list[Term]:
    """The sync points in the order in which the model meets them, then the consecutive pairs of both kinds."""
    points = [Point(block=block, sync_point=kind) for block in range(num_blocks) for kind in KINDS][:-1]
    terms: list[Term] = [(p,) for p in points if p.sync_point in sync_points]
    return terms + (list(itertools.pairwise(points)) if len(set(sync_points)) == 2 else [])


def fisher(
    lm: TensorParallelLM,
    sequences: Sequence[Sequence[int]],
    sync_points: Sequence[SyncPoint],
    target_stderr: float,
    batch_size: int = 8,
    seed: int = 0,
    tick: Callable[[], None] = lambda: None,
    journal: Journal | OfText | None = None,
) -> tuple[Baseline, Fisher]:
    """The dense model's baseline and the interactions of all sync points, block_drop at each.

    Raises InputError where there is none. Samples are drawn until the signs' share of the relative standard error is
    at most `target_stderr` (mean over the sync points). With Gaussian d that share is sqrt(2 / (sequences * samples))
    where all sequences weigh the same; the first pass draws as many samples, further passes what the error then found
    still asks for.
    `tick` is called after each batch. What `journal` holds, by pass and batch, is not run again.
    """
    generator = torch.Generator(lm.device).manual_seed(seed)
    terms = fisher_terms(lm.num_blocks, sync_points)
    points = [term[0] for term in terms if len(term) == 1]
    if not points:
        raise InputError("There is no such sync point to drop: behind the last block's MLP nothing follows.")
    tokens = torch.tensor([len(s) - 1 for s in sequences], dtype=torch.float64)
    samples = first_samples(len(sequences), target_stderr)
    in_turn = _in_turn(len(points), seed)
    dense, measured, passes = Tally(), Dropped(), list[Tensor]()
    while samples > 0:
        scores = []
        for number, (input_ids, lengths) in enumerate(batches(sequences, batch_size, lm.device)):
            drawn = list(dict.fromkeys(itertools.islice(in_turn, DRAWS)))

            def run(
                ids: Tensor = input_ids, lengths: list[int] = lengths, drawn: list[int] = drawn, samples: int = samples
            ) -> dict:
                lm.keep_all()
                recording = lm.record(ids)
                reference = Reference(lm, recording.final, ids, lengths)
                finals = [run_dropped(lm, recording, points[i]) for i in drawn]
                tallies = [reference.compare(final, False) for final in finals]
                end = finals[0] if tallies[0].kl() <= BROKEN else None
                by_term = score(lm, recording, lengths, sync_points, samples, generator, end)
                d = torch.stack([by_term[term] for term in terms], dim=-1).double()
                return {
                    "scores": d.tolist(),
                    "dense": (Tally() if passes else reference.compare(recording.final, False)).state(),
                    "dropped": [tally.state() for tally in tallies],
                    "generator": generator.get_state().numpy().tobytes().hex(),
                }

            found = once(journal, (len(passes), number), run)
            generator.set_state(torch.tensor(list(bytes.fromhex(found["generator"])), dtype=torch.uint8))
            dense.add(Tally.of_state(found["dense"]))
            for i, state in zip(drawn, found["dropped"], strict=True):
                measured[i, number * batch_size] = Tally.of_state(state)
            scores.append(torch.tensor(found["scores"], dtype=torch.float64))
            tick()
        passes.append(torch.cat(scores, dim=1))
        d = torch.cat(passes)  # [samples, sequences, terms]
        error = sampling_error(d[..., : len(points)])
        samples = math.ceil(len(d) * (error**2 / target_stderr**2 - 1) - 0.01)
    q = d[..., : len(points)].pow(2).mean(0) / 2
    factor, left = factors(q, tokens, measured, error)
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


def _in_turn(points: int, seed: int) -> Iterator[int]:
    """Indices of sync points, all in a random order, then all in another, and so on."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(points, generator=generator).tolist()


def _measured(points: Sequence[Point], measured: Dropped, predicted: Tensor) -> list[MeasuredPoint]:
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
    """Samples of a sequence that leave the error asked for where all sequences weigh the same."""
    return math.ceil(2 / (sequences * target_stderr**2))


def interactions(d: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Matrix 1/2 E[d_i d_j] per token and its standard error over sequences (as metrics.Tally), both [terms, terms].

    d [samples, sequences, terms], tokens [sequences].
    """
    q = torch.einsum("sni,snj->nij", d, d) / (2 * len(d))  # summed over each sequence's tokens
    mean = q.sum(0) / tokens.sum()
    squares = (q - mean * tokens[:, None, None]).pow(2).sum(0)
    m = len(tokens)
    return mean, (squares * m / max(m - 1, 1)).sqrt() / tokens.sum()


def sampling_error(d: Tensor) -> float:
    """The relative standard error of 1/2 E[d_i^2] that is due to the signs alone; mean over the terms of d.

    For Gaussian d, Var(d^2) = 2 E[d^2]^2 = 2/3 E[d^4]; sums of signs have lighter tails than that.
    """
    variance = (2 / 3) * d.pow(4).sum((0, 1))
    return (variance.sqrt() / d.pow(2).sum((0, 1)).clamp(min=1e-300)).mean().item()


@dataclass(frozen=True)
class _Passed:
    """A block run with every sync point kept: what stood behind either of them, and the gradients there.

    mid and out are [B, T, d], the gradients [samples, B, T, d].
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
    lengths: Sequence[int],
    sync_points: Sequence[SyncPoint],
    samples: int,
    generator: torch.Generator,
    dropped: Tensor | None = None,
) -> dict[Term, Tensor]:
    """d of every term, [samples, B]: the blocks are run once more from what entered them, from the last backwards.

    `dropped` [B, T, d]: what left the final norm with some sync point dropped; without it F is the dense model's alone.
    Nothing but two blocks' activations is held beside the recording.
    """
    d: dict[Term, Tensor] = {}
    gradient = final_gradient(lm, recording.final, lengths, samples, generator, dropped)
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
    """Add to `d` what dropping either sync point of a block does, and with `with_mlp` the pairs of consecutive ones.

    x entered the block; `attended` and `fed` are the ranks' partial sums with every sync point kept.
    """
    block, comm = here.block, here.block.comm
    attention = Point(block=block.index, sync_point="attention")
    owed_by_attention = defer(Streams(x), attended, block.o_bias)
    fed_by_own = block.feed(owed_by_attention)
    settled = keep(owed_by_attention, fed_by_own, block.down_bias, comm)
    d[(attention,)] = _dot(here.grad_out, settled.shared - here.out)
    if not with_mlp or following is None:
        return
    mlp = Point(block=block.index, sync_point="mlp")
    next_attention = Point(block=block.index + 1, sync_point="attention")
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
    """[samples, B, T, d] with [B, T, d], over positions and width: [samples, B]."""
    return torch.einsum("sbtd,btd->sb", gradients.float(), change.float())


def backward(output: Tensor, inputs: list[Tensor], gradients: Tensor) -> list[Tensor]:
    """Gradients of <gradients[s], output> for each s with respect to `inputs`: one [samples, *shape] for each input."""
    last = len(gradients) - 1
    found = [torch.autograd.grad(output, inputs, g, retain_graph=s < last) for s, g in enumerate(gradients)]
    return [torch.stack(of_input) for of_input in zip(*found, strict=True)]


def run_dropped(lm: TensorParallelLM, recording: Recording, point: Point) -> Tensor:
    """What leaves the final norm with one sync point dropped, [B, T, d]. Leaves every sync point kept."""
    experiment = Experiment.of({point: Strategy.BLOCK_DROP}, lm.num_blocks)
    lm.set_strategies(experiment.attention, experiment.mlp)
    final = lm.resume(recording, experiment.first)
    lm.keep_all()
    return final


def final_gradient(
    lm: TensorParallelLM,
    final: Tensor,
    lengths: Sequence[int],
    samples: int,
    generator: torch.Generator,
    dropped: Tensor | None,
) -> Tensor:
    """Gradient [samples, B, T, d] of sum_t <s_t, z_t> with respect to what left the final norm, `final` [B, T, d].

    Every predicted token has a score: none stands at the last position of a sequence, nor at padding.
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
            logits = lm.head(hidden[None])[0]
        p, q = (z.detach().float().softmax(-1) for z in (logits, lm.logits(end[None])[0]))
        scores = []
        for _ in range(samples):
            at_end = torch.rand(len(p), 1, generator=generator, device=p.device) < 1 / 3
            scores.append(_signed_root(torch.where(at_end, q, p), generator))
        found.append(backward(logits, [hidden], torch.stack(scores).to(logits.dtype))[0])
    gradient[:, positions] = torch.cat(found, dim=1)
    return gradient


def _signed_root(p: Tensor, generator: torch.Generator) -> Tensor:
    """A e for random signs e: sqrt(p) e - p <sqrt(p), e>, for p [N, V]."""
    signs = torch.randint(0, 2, p.shape, generator=generator, device=p.device, dtype=torch.int8) * 2 - 1
    root = p.sqrt() * signs
    return root - p * root.sum(-1, keepdim=True)


def _short(value: Tensor | float) -> float:
    """Six digits: a file of many entries stays readable, and small."""
    return float(f"{float(value):.6g}")
