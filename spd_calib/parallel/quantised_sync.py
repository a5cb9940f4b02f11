"""The quantised sync: what ranks send of their partial sums where a sync point is kept, but with fewer bits a value.

A message [..., W] is cut, token by token, into groups of 64 values along its width; the last group of a token is filled
up with its last value. A group is sent as its codes, the step between two codes (bfloat16) and the code of 0 (a byte):

    low = min(x, 0) ; high = max(x, 0) ; step = bfloat16((high - low) / (2^bits - 1))
    zero = round(-low / step) ; code = round(x / step) + zero, held within 0 ... 2^bits - 1

What arrives is step * (code - zero), float32: of a value much smaller than a step exactly 0, so that beside an outlier
the others are not all moved alike. The ranks' partial sums are added up in float32, in the order of the ranks, and the
sum is cast back to the dtype of the message. Small messages are sent in one shot: every rank gathers all of them and
adds them up. Large ones are sent in two, where there are more than two ranks: each rank gets its share of the groups
from all, adds them up, and what it sends on to all, the sum, is quantised once more. `in_two_shots` is the rule; real
ranks and simulated ones do the same.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

GROUP = 64  # values that share a step
SCALES = 3  # bytes of that, and of the code of 0
ONE_SHOT_AT_MOST = 2**15  # bytes of a message as it is sent; as of one that is not quantised (comm.GATHERED_AT_MOST)


def in_two_shots(message_bytes: int, ranks: int, *, one_shot_at_most: int = ONE_SHOT_AT_MOST) -> bool:
    """Say whether a message of so many bytes, as it is sent, takes two shots: fewer bytes, but it waits twice.

    Each of n ranks then sends 2 (n - 1) / n times the message's bytes, in one shot n - 1 times.
    """
    return ranks > 2 and message_bytes > one_shot_at_most


def packed_bytes(shape: torch.Size, bits: int) -> int:
    """Return the bytes of a message of this shape, [..., W], as it is sent."""
    return shape[:-1].numel() * -(-shape[-1] // GROUP) * (GROUP * bits // 8 + SCALES)


def bytes_a_value(bits: int | None) -> float:
    """Return the bytes of a value of a message as it is sent; 2, those of bfloat16 and float16, without bits."""
    return 2.0 if bits is None else bits / 8 + SCALES / GROUP


def grouped(message: Tensor) -> Tensor:
    """Return a message [..., W] as groups of values, [G, 64], float32."""
    rows = message.reshape(-1, message.shape[-1]).float()
    if missing := -rows.shape[-1] % GROUP:
        rows = torch.cat([rows, rows[:, -1:].expand(-1, missing)], dim=-1)
    return rows.reshape(-1, GROUP)


def ungrouped(groups: Tensor, like: Tensor) -> Tensor:
    """Return groups [G, 64] as a message of the shape and dtype of `like`, [..., W]."""
    width = like.shape[-1]
    return groups.reshape(-1, width + -width % GROUP)[:, :width].reshape(like.shape).to(like.dtype)


def quantise(groups: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the codes of groups [G, 64], their step (bfloat16) and the code of 0, both [G, 1]; codes are uint8."""
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    most = 2**bits - 1
    step = ((high - low) / most).bfloat16()
    by = torch.where(step > 0, step, 1).float()  # all values of a group may be 0
    zero = (-low / by).round_().clamp_(0, most)
    codes = (groups / by).round_().add_(zero).clamp_(0, most)
    return codes.to(torch.uint8), step, zero.to(torch.uint8)


def dequantise(codes: Tensor, step: Tensor, zero: Tensor) -> Tensor:
    """Return what arrives of groups, [G, 64] float32, given what `quantise` returned."""
    return step.float() * (codes.float() - zero)


def arriving(groups: Tensor, bits: int) -> Tensor:
    """Return what arrives where these groups, [G, 64], are sent."""
    return dequantise(*quantise(groups, bits))


def quantised_sum(partials: Iterable[Tensor], bits: int, *, twice: bool) -> Tensor:
    """Return the sum of the ranks' partial sums, [..., W] each and in the order of ranks, as a quantised sync gives it.

    In their dtype; `twice`: as in two shots.
    """
    own = iter(partials)
    like = next(own)
    total = arriving(grouped(like), bits)
    for partial in own:
        total += arriving(grouped(partial), bits)
    return ungrouped(arriving(total, bits) if twice else total, like)


def pack(groups: Tensor, bits: int) -> Tensor:
    """Return groups [G, 64] as they are sent: bytes [G, 64 * bits / 8 + 3], the codes, the step, the code of 0."""
    codes, step, zero = quantise(groups, bits)
    return torch.cat([_packed_codes(codes, bits), step.view(torch.uint8), zero], dim=-1)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Return what arrives of packed groups, [G, 64] float32."""
    codes, zero = packed[:, :-SCALES], packed[:, -1:]
    step = packed[:, -SCALES:-1].clone(memory_format=torch.contiguous_format).view(torch.bfloat16)
    return dequantise(_unpacked_codes(codes, bits), step, zero)


def sum_of_packed(parts: Iterable[Tensor], bits: int) -> Tensor:
    """Return the sum of the ranks' packed groups, in the order of the parts, [G, 64] float32."""
    values = (unpack(part, bits) for part in parts)
    total = next(values)
    for part in values:
        total += part
    return total


def _packed_codes(codes: Tensor, bits: int) -> Tensor:
    """Return codes [G, 64] as bytes [G, 64 * bits / 8]: two of 4 bits in a byte, four of 6 bits in three."""
    if bits == 8:
        return codes
    if bits == 4:
        first, second = codes.view(len(codes), -1, 2).unbind(-1)
        return first | second << 4
    a, b, c, d = codes.view(len(codes), -1, 4).unbind(-1)
    return torch.stack([a | b << 6, b >> 2 | c << 4, c >> 4 | d << 2], dim=-1).flatten(1)


def _unpacked_codes(packed: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return packed
    if bits == 4:
        return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)
    x, y, z = packed.view(len(packed), -1, 3).unbind(-1)
    return torch.stack([x & 63, x >> 6 | (y & 15) << 2, y >> 4 | (z & 3) << 4, z >> 2], dim=-1).flatten(1)
