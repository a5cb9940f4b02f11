"""Quantised syncs: what arrives of a message, how it is packed, and what a model makes of it."""

import math

import pytest
import reference
import tiny
import torch

from spd_calib.formats.drops import Drops, Point
from spd_calib.parallel.comm import SimulatedComm
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.parallel.quantised_sync import (
    arriving,
    bytes_a_value,
    grouped,
    in_two_shots,
    pack,
    packed_bytes,
    quantised_sum,
    sum_of_packed,
    ungrouped,
    unpack,
)


def messages(ranks: int, *shape: int) -> list[torch.Tensor]:
    """Partial sums with an outlier in each token, as language models have them."""
    generator = torch.Generator().manual_seed(0)
    found = [torch.randn(shape, generator=generator) for _ in range(ranks)]
    for part in found:
        part[..., 3] += 20
    return found


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("width", [5, 64, 100, 192])
def test_what_is_packed_arrives(bits, width):
    (message,) = messages(1, 2, 3, width)
    packed = pack(grouped(message), bits)
    groups = -(-width // 64) * 6
    assert packed.dtype == torch.uint8 and packed.numel() == groups * (8 * bits + 3)
    assert packed.numel() == packed_bytes(message.shape, bits)
    arrived = unpack(packed, bits)
    assert torch.equal(arrived, arriving(grouped(message), bits)) and torch.equal(arrived[:1], unpack(packed[:1], bits))
    back = ungrouped(arrived, message)
    for start in range(0, width, 64):
        own, other = message[..., start : start + 64], back[..., start : start + 64]
        span = own.amax(-1).clamp(min=0) - own.amin(-1).clamp(max=0)
        assert ((own - other).abs().amax(-1) <= span / (2**bits - 1) + span / 256).all()  # that much of bfloat16's step
        assert (other[own.abs() < span[..., None] / 2.1 / 2**bits] == 0).all()


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("ranks", [2, 3])
def test_the_sum_is_the_one_made_value_by_value(bits, ranks):
    parts = messages(ranks, 2, 100)
    before = [p.clone() for p in parts]
    comm = SimulatedComm(ranks)
    found = comm.all_reduce(iter(parts), bits=bits)
    assert torch.allclose(found.double(), reference.quantised_sum([p.double() for p in parts], bits), atol=1e-5)
    assert all(map(torch.equal, parts, before))
    assert (comm.all_reduces, comm.elements, comm.bytes) == (1, 200, packed_bytes(found.shape, bits))
    sent_on = sum_of_packed([pack(grouped(p), bits) for p in parts], bits)
    assert torch.equal(ungrouped(sent_on, found), found)
    comm.one_shot_at_most = 0
    two_shots = comm.all_reduce(parts, bits=bits)
    expected = reference.quantised_sum([p.double() for p in parts], bits, twice=ranks > 2)
    assert torch.allclose(two_shots.double(), expected, atol=1e-5) and torch.equal(two_shots, found) == (ranks == 2)


def test_large_messages_take_two_shots_where_there_are_more_than_two_ranks():
    assert [in_two_shots(2**15 + more, ranks) for ranks in (2, 3) for more in (0, 1)] == [False, False, False, True]


@pytest.mark.parametrize("twice", [False, True])
def test_a_token_is_the_same_whatever_is_beside_it_in_the_message(twice):
    parts = messages(3, 4, 7, 100)
    whole = quantised_sum(parts, 4, twice=twice)
    assert torch.equal(whole[2:3, 5:6], quantised_sum([p[2:3, 5:6] for p in parts], 4, twice=twice))
    assert quantised_sum([p.bfloat16() for p in parts], 4, twice=twice).dtype == torch.bfloat16


def test_groups_of_one_value_and_of_no_number():
    constant = torch.full((1, 64), 3.0)
    assert torch.allclose(arriving(constant, 4), constant, rtol=1 / 256) and not arriving(0 * constant, 8).any()
    for value in (math.nan, math.inf, -math.inf):
        broken = constant.clone()
        broken[0, 7] = value
        assert not arriving(broken, 8).isfinite().any()  # whoever looks for what overflows still finds it


def test_the_code_of_zero_is_a_code_where_the_step_is_rounded_down():
    """The step is 1 + 1/256, of which bfloat16 makes 1: 256 steps of it from 0 down to the lowest value, of 255."""
    group = torch.zeros(1, 64)
    group[0, :2] = torch.tensor([-255 - 255 / 256, -7.0])
    arrived = arriving(group, 8)
    assert arrived[0, :2].tolist() == [-255, -7] and not arrived[0, 2:].any()
    assert arriving(-group, 8)[0, :2].tolist() == [255, 7]


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_bytes_of_a_value_are_those_of_a_message_of_whole_groups(bits):
    assert bytes_a_value(bits) == pack(torch.ones(2, 64), bits).numel() / 128 and bytes_a_value(None) == 2


PLACES = {
    "the sum alone": (["keep_sync"] * 4, ["keep_sync"] * 4, (1, "attention")),
    "an MLP's with what its attention owes": (["keep_sync", "block_drop"] * 2, ["keep_sync"] * 4, (1, "mlp")),
    "an attention's with what the MLP before owes": (
        ["keep_sync"] * 4,
        ["keep_sync", "block_drop", "keep_sync", "keep_sync"],
        (2, "attention"),
    ),
    "with what a whole block owes": (["block_drop"] * 4, ["block_drop"] * 3 + ["keep_sync"], (3, "mlp")),
    "the last": (["keep_sync"] * 4, ["keep_sync"] * 4, (3, "mlp")),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_one_quantised_sync_in_a_model_is_the_references(family, place):
    """One only: behind a second, what rounding turns to the next code would be told from it no more."""
    attention, mlp, point = PLACES[place]
    dense, ids = tiny.build(family), tiny.tokens(2, 6)
    lm, drops = TensorParallelLM.simulated(tiny.build(family), 2), Drops.of_blocks(attention, mlp)
    with lm.running(drops):
        in_full = lm(ids)
    with lm.running(drops | Drops.of_bits({Point(*point): 4})):
        found = lm(ids)
    expected = reference.logits(dense, ids, 2, attention, mlp, bits={point: 4})
    assert (found - expected).abs().max() < 1e-4 < 0.1 * (found - in_full).abs().max()


def test_more_bits_are_closer_to_dense_and_it_is_dense_again_afterwards():
    lm, ids = TensorParallelLM.simulated(tiny.build("llama"), 4), tiny.tokens(2, 10)
    dense, off = lm(ids), {}
    for bits in (8, 6, 4):
        every = [point for block in lm.blocks for point in (block.attention_point, block.mlp_point)]
        with lm.running(Drops.of_bits(dict.fromkeys(every, bits))):
            off[bits] = (lm(ids) - dense).abs().mean().item()
    assert 0 < off[8] < off[6] / 2 < off[4] / 4
    assert torch.equal(lm(ids), dense)
