"""What each kind of sync point does to the ranks' streams, in numbers small enough for paper."""

import pytest
import torch

from spd_calib.parallel.comm import SimulatedComm
from spd_calib.parallel.streams import Streams, defer, keep, write_off


@pytest.mark.parametrize("owed", [False, True])
def test_each_kind_of_sync_point_by_hand(owed):
    """Two ranks, one number each: x = 10, partial sums 1 and 2, bias 100; they may owe 3 and 4, and have kept 5, 6."""

    def t(*values):
        return [torch.tensor([[[float(v)]]]) for v in values]

    def numbers(s: Streams):
        held = [None if part is None else [p.item() for p in part] for part in (s.debt, s.written_off)]
        return s.shared.item(), *held, [s.read(i).item() for i in (0, 1)]

    (x,), partials, (bias,) = t(10), t(1, 2), t(100)
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
        assert numbers(keep(s, partials, None, comm)) == (13, None, None, [13, 13])
        assert numbers(defer(s, iter(partials), bias)) == (110, [1, 2], None, [111, 112])
        assert numbers(write_off(s, iter(partials), None)) == (10, None, [1, 2], [11, 12])
    assert comm.all_reduces == 1 and not Streams(x, None, t(1, 1)).agree and not Streams(x, t(1, 1)).agree


def test_a_tensor_is_the_stream_that_all_ranks_share():
    x = torch.ones(1, 2, 3)
    s = Streams.of(x)
    assert s.shared is x and s.debt is None and s.written_off is None
    owing = Streams(x, [x, x])
    assert Streams.of(owing) is owing
