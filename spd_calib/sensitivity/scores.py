"""Scoring sync points: what dropping each changes, weighed by random scores, d of every term (used by fisher.py).

The change is exact up to the sync point that settles the debt; from there on the gradient carries it.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spd_calib.formats.drops import KEPT, Drops, Point, Strategy, Sublayer
from spd_calib.parallel.block import Block, Fed
from spd_calib.parallel.model import Recording, TensorParallelLM
from spd_calib.parallel.streams import Streams

LOGITS_AT_A_TIME = 2**22  # float32 logits and their scores held at once: 16 MiB a tensor
Term = tuple[Point, ...]  # one sync point, or two consecutive ones: what they change beyond their sum


@dataclass(frozen=True)
class _Passed:
    """A block run with every sync point kept: its partial sums, the streams, and the gradients behind each sync point.

    entered, mid (behind the attention's) and out (behind the MLP's) are [B, T, d]; `attended` are the ranks' partial
    sums [B, T, d] and head outputs, `fed` what their MLPs give; the gradients are [samples, B, T, d].
    """

    block: Block
    kwargs: dict
    entered: Tensor
    attended: tuple[list[Tensor], list[Tensor]]
    fed: Fed
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
    points = [point for block in lm.blocks for point in (block.attention_point, block.mlp_point)][:-1]
    drops = lm.fitted(Drops.of(dict.fromkeys(points, Strategy.BLOCK_DROP)))
    gradient = final_gradient(
        lm, recording.final, lengths=lengths, samples=samples, generator=generator, dropped=dropped
    )
    following: _Passed | None = None
    for block, entered, kwargs in reversed(list(zip(lm.blocks, recording.streams, recording.kwargs, strict=True))):
        x = entered.shared.detach().requires_grad_()
        with torch.enable_grad():
            attended = block.attend(Streams(x), **kwargs)
            mid, _ = block.behind_attention(KEPT, Streams(x), *attended)
            fed = block.feed(mid)
            out = block.behind_mlp(KEPT, mid, fed).shared
            if following is None:
                left = out.detach().requires_grad_()
                gradient = backward(lm.final_norm(Streams(left)), [left], gradients=gradient)[0]
        grad_mid, grad_in = backward(out, [mid.shared, x], gradients=gradient)
        passed = _Passed(
            block,
            kwargs,
            entered=x.detach(),
            attended=([a.detach() for a in attended[0]], [z.detach() for z in attended[1]]),
            fed=Fed([f.detach() for f in fed.partials], None if fed.bias is None else fed.bias.detach()),
            mid=mid.shared.detach(),
            out=out.detach(),
            grad_mid=grad_mid,
            grad_out=gradient,
        )
        with torch.no_grad():
            _add_terms(d, passed, following=following if "mlp" in sync_points else None, drops=drops)
        following, gradient = passed, grad_in
    return d


def _add_terms(d: dict[Term, Tensor], here: _Passed, *, following: _Passed | None, drops: Drops) -> None:
    """Add to `d` the term of a block's attention and, if a block is `following`, those of its MLP and of the pairs.

    `drops` says how each sync point is dropped.
    """
    block, attention, mlp = here.block, here.block.attention_point, here.block.mlp_point
    owed_by_attention, mlps_read = block.behind_attention(drops.at(attention), Streams(here.entered), *here.attended)
    fed_by_own = block.feed(mlps_read)
    settled = block.behind_mlp(KEPT, owed_by_attention, fed_by_own)
    d[(attention,)] = _dot(here.grad_out, settled.shared - here.out)
    if following is None:
        return
    after, kwargs = following.block, following.kwargs
    owed_by_mlp = block.behind_mlp(drops.at(mlp), Streams(here.mid), here.fed)
    attended = after.attend(owed_by_mlp, **kwargs)
    settled, _ = after.behind_attention(KEPT, owed_by_mlp, *attended)
    d[(mlp,)] = _dot(following.grad_mid, settled.shared - following.mid)

    next_attention = after.attention_point
    owed, mlps_read = after.behind_attention(drops.at(next_attention), owed_by_mlp, *attended)
    settled = after.behind_mlp(KEPT, owed, after.feed(mlps_read))
    together = _dot(following.grad_out, settled.shared - following.out)
    d[(mlp, next_attention)] = together - d[(mlp,)] - d[(next_attention,)]

    owed = block.behind_mlp(drops.at(mlp), owed_by_attention, fed_by_own)
    settled, _ = after.behind_attention(KEPT, owed, *after.attend(owed, **kwargs))
    together = _dot(following.grad_mid, settled.shared - following.mid)
    d[(attention, mlp)] = together - d[(attention,)] - d[(mlp,)]


def _dot(gradients: Tensor, change: Tensor) -> Tensor:
    """Return <gradients, change> for gradients [samples, B, T, d] and a change [B, T, d], summed over T and d."""
    return torch.einsum("sbtd,btd->sb", gradients.float(), change.float())


def backward(output: Tensor, inputs: list[Tensor], *, gradients: Tensor) -> list[Tensor]:
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
        found.append(backward(logits, [hidden], gradients=torch.stack(scores).to(logits.dtype))[0])
    gradient[:, positions] = torch.cat(found, dim=1)
    return gradient


def _signed_root(p: Tensor, generator: torch.Generator) -> Tensor:
    """Return A e [N, V] for probabilities p [N, V] and random signs e: sqrt(p) e - p <sqrt(p), e>."""
    signs = torch.randint(0, 2, p.shape, generator=generator, device=p.device, dtype=torch.int8) * 2 - 1
    root = p.sqrt() * signs
    return root - p * root.sum(-1, keepdim=True)
