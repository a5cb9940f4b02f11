"""What each kind of sync point does to the ranks' streams, in numbers small enough for paper."""

import pytest
import torch

from spd_calib.parallel.comm import SimulatedComm
from spd_calib.parallel.streams import Branch, Streams, defer, in_full, keep, times, write_off


@pytest.mark.parametrize("owed", [False, True])
def test_each_kind_of_sync_point_by_hand(owed):
    """Two ranks, one number each: x = 10, partial sums 1 and 2, bias 100; they may owe 3 and 4, and have kept 5, 6."""

    def t(*values):
        return [torch.tensor([[[float(v)]]]) for v in values]

    def numbers(s: Streams):
        held = [None if part is None else [p.item() for p in part] for part in (s.debt, s.written_off)]
        return s.shared.item(), *held, [s.read(i).item() for i in (0, 1)]

    (x,), partials, bias = t(10), t(1, 2), Branch(t(100)[0])
    s = Streams(x, t(3, 4), t(5, 6)) if owed else Streams(x)
    assert s.agree != owed and [s.read(i).item() for i in (0, 1)] == ([18, 20] if owed else [10, 10])
    comm = SimulatedComm(2)
    if owed:
        assert numbers(keep(s, partials, bias, comm)) == (120, None, [5, 6], [125, 126])
        assert numbers(defer(s, partials, bias)) == (110, [4, 6], [5, 6], [119, 122])
        assert numbers(write_off(s, partials, bias)) == (110, [3, 4], [6, 8], [119, 122])
        for act in (defer, write_off):
            with pytest.raises(ValueError, match="zip"):
                act(s, partials[:1], bias)
    else:
        assert numbers(keep(s, partials, Branch(), comm)) == (13, None, None, [13, 13])
        assert numbers(defer(s, iter(partials), bias)) == (110, [1, 2], None, [111, 112])
        assert numbers(write_off(s, iter(partials), Branch())) == (10, None, [1, 2], [11, 12])
    assert comm.all_reduces == 1 and not Streams(x, None, t(1, 1)).agree and not Streams(x, t(1, 1)).agree


def test_sums_behind_a_norm_wait_side_by_side_for_one_message():
    """Two ranks, x = 10; A doubles and adds nothing, M squares what its bias 1 was added to, times 3."""

    def t(*values):
        return [torch.tensor([[[float(v)]]]) for v in values]

    (x,), comm = t(10), SimulatedComm(2)
    doubling, squaring = Branch(None, lambda v: 2 * v), Branch(t(1)[0], lambda v: v**2, 3.0)
    owing = Streams(x, t(100, 200), t(5, 6))
    assert keep(Streams(x), t(1, 2), squaring, comm).shared.item() == 10 + 3 * (1 + 2 + 1) ** 2
    off = write_off(owing, t(1, 2), squaring)
    assert [p.item() for p in off.written_off] == [5 + 3 * 2**2, 6 + 3 * 3**2] and off.debt is owing.debt
    assert (Branch(t(7)[0])(x), Branch()(x), squaring(x)) == (17, 10, 3 * 11**2)
    assert Branch(None, lambda v: v, 2.0)(x) == 20

    s = defer(owing, t(1, 2), doubling)
    assert [s.read(i).item() for i in (0, 1)] == [10 + 100 + 5 + 2, 10 + 200 + 6 + 4] and not s.settled
    s = defer(s, t(3, 4), squaring, estimates=t(7, 8))  # the ranks' own estimates in place of squaring(3), squaring(4)
    assert [s.read(i).item() for i in (0, 1)] == [117 + 7, 220 + 8] and s.shared is x
    assert all(drop(s, t(1, 2), Branch()).waiting is s.waiting for drop in (defer, write_off))
    full = 10 + 300 + 2 * (1 + 2) + 3 * (3 + 4 + 1) ** 2
    assert in_full(s).item() == full and in_full(owing).item() == 310

    twice = times(s, torch.tensor([2.0]))  # and so does all that is to join it later
    assert [twice.read(i).item() for i in (0, 1)] == [2 * 124, 2 * 228] and in_full(twice).item() == 2 * full
    assert times(Streams(x), torch.tensor([2.0])).agree

    before = comm.all_reduces, comm.elements
    for branch, more in ((doubling, 2 * (5 + 6)), (Branch(t(1)[0]), 5 + 6 + 1)):
        settled = keep(s, iter(t(5, 6)), branch, comm)
        assert settled.shared.item() == full + more and settled.settled
        assert [p.item() for p in settled.written_off] == [5, 6]
    # one message each: the debt, the two that waited, and the sum that is kept; linear, that one is in the debt's
    assert (comm.all_reduces - before[0], comm.elements - before[1]) == (2, 4 + 3)


def test_a_tensor_is_the_stream_that_all_ranks_share():
    x = torch.ones(1, 2, 3)
    s = Streams.of(x)
    assert s.shared is x and s.debt is None and s.written_off is None
    owing = Streams(x, [x, x])
    assert Streams.of(owing) is owing
