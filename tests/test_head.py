"""The output head cut over the vocabulary, and the hidden states that differ from rank to rank on the way to it."""

import pytest
import torch
from torch import nn

from spd_calib.parallel.comm import SimulatedComm
from spd_calib.parallel.head import FinalNorm, PerRank, VocabParallelHead
from spd_calib.parallel.streams import Streams


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_cut_head_is_the_whole_head(ranks, bias):
    """A vocabulary of 10: parts of 10, 5, 4 and 3, the last shorter. Of streams that differ, each its own part."""
    head = nn.Linear(6, 10, bias=bias)
    cut = VocabParallelHead(head, SimulatedComm(ranks))
    hidden = torch.randn(2, 5, 6)
    assert torch.allclose(cut(hidden), head(hidden), atol=1e-6) and cut(hidden).is_contiguous()
    in_parts = [part.logits(hidden[0]) for part in cut.parts(2)]
    assert torch.allclose(torch.cat(in_parts, -1), head(hidden[0]), atol=1e-6) and len(in_parts) >= 5
    streams = torch.randn(ranks, 2, 5, 6)
    width = -(-10 // ranks)
    expected = torch.cat([head(s)[..., r * width : (r + 1) * width] for r, s in enumerate(streams)], -1)
    assert torch.allclose(cut(streams.flatten(0, 1).as_subclass(PerRank)), expected, atol=1e-6)


def test_the_vocabulary_can_be_cut_elsewhere():
    head = nn.Linear(6, 10)
    cut = VocabParallelHead(head, SimulatedComm(2))
    streams = torch.randn(2, 1, 5, 6)
    cut.cut_at([slice(0, 7), slice(7, 10)])
    assert [(part.rank, part.first, len(part.weight)) for part in cut.parts(4)] == [(0, 0, 4), (0, 4, 3), (1, 7, 3)]
    expected = torch.cat([head(streams[0])[..., :7], head(streams[1])[..., 7:]], -1)
    assert torch.allclose(cut(streams.flatten(0, 1).as_subclass(PerRank)), expected, atol=1e-6)


def test_slices_of_streams_that_differ_still_differ():
    """As transformers' logits_to_keep takes them, by a slice or by positions, and as Reference.compare does."""
    head, cut = nn.Linear(6, 10), None
    cut = VocabParallelHead(head, SimulatedComm(2))
    streams = torch.randn(4, 5, 6).as_subclass(PerRank)
    whole = cut(streams)
    for kept in (slice(-1, None), slice(0, None), torch.tensor([1, 3])):
        part = streams[:, kept, :]
        assert isinstance(part, PerRank)
        assert torch.allclose(cut(part), whole[:, kept], atol=1e-6)
    assert isinstance(streams.unflatten(0, (-1, 2))[:, torch.ones(2, 5, dtype=torch.bool)], PerRank)
    assert type(whole) is torch.Tensor


def test_the_final_norm_tells_streams_that_differ_apart():
    norm = nn.LayerNorm(6)
    x, kept = torch.randn(2, 5, 6), [torch.randn(2, 5, 6) for _ in range(3)]
    equal = FinalNorm(norm)(Streams(x))
    assert torch.equal(equal, norm(x)) and not isinstance(equal, PerRank)
    differ = FinalNorm(norm)(Streams(x, None, kept))
    assert isinstance(differ, PerRank) and torch.equal(
        differ.as_subclass(torch.Tensor), torch.cat([norm(x + k) for k in kept])
    )
    with pytest.raises(AssertionError, match="settles every debt"):
        FinalNorm(norm)(Streams(x, kept))
