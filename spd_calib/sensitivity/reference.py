"""The dense model's predictions for a batch, with which any number of plans are compared in one go."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from spd_calib.parallel.head import VocabularyPart
from spd_calib.parallel.model import TensorParallelLM

from .metrics import Tally
from .predictions import Predictions, token_metrics

HELD_BYTES = 2**27  # of the hidden states of plans that are compared together
CPU_TILE = (256, 1024)  # tokens and logits of each that are looked at together: few enough for a CPU's caches
TILE = (2048, 8192)  # on any other device


def plans_at_a_time(lm: TensorParallelLM, tokens: int) -> int:
    """Return how many plans to compare together on this many tokens, at least 1.

    What leaves their final norms takes HELD_BYTES at most, and no more than the logits of one of them would.
    """
    hidden = tokens * lm.blocks[0].width * lm.model.dtype.itemsize
    return max(1, min(HELD_BYTES, tokens * lm.head.vocab_size * 4) // hidden)


class Reference:
    """The dense model's predictions for one batch of token ids [B, T].

    `final` [B, T, d] is what left the dense model's final norm. Logits are computed in tiles, some tokens by a part of
    the vocabulary, and dropped at once. A tile of the dense model's is computed once to know its sum of exponentials,
    and once more for all plans that are compared together.
    """

    def __init__(self, lm: TensorParallelLM, final: Tensor, *, input_ids: Tensor, lengths: Sequence[int]):
        self.lm, self.lengths = lm, lengths
        predicting = torch.arange(final.shape[1])[None] < torch.tensor(lengths)[:, None] - 1  # [B, T]
        self.predicting = predicting.to(final.device)
        self.targets = input_ids[:, 1:][self.predicting[:, :-1]]
        tokens, self.part = CPU_TILE if final.device.type == "cpu" else TILE
        self.chunks = [slice(i, i + tokens) for i in range(0, len(self.targets), tokens)]
        self.hidden = self.streams(final)
        self.dense = [self._predicted(chunk) for chunk in self.chunks]

    def streams(self, final: Tensor) -> Tensor:
        """Return, of what left a final norm, [B, T, d] or head.PerRank, what predicts a token: [1 or ranks, N, d]."""
        return final.as_subclass(Tensor).unflatten(0, (-1, len(self.lengths)))[:, self.predicting]

    @torch.no_grad()
    def tally(self) -> Tally:
        """Return a tally of the dense model compared with itself."""
        return self._tally(self.dense)

    @torch.no_grad()
    def compare(self, plans: Sequence[Tensor]) -> list[Tally]:
        """Compare what predicts a token under each of `plans` (`streams`) with the dense model; return their tallies.

        The vocabulary is gone through once for all of them.
        """
        found: list[list[Predictions]] = [[] for _ in plans]
        for chunk, dense in zip(self.chunks, self.dense, strict=True):
            targets = self.targets[chunk]
            of_chunk = [Predictions.none_yet(targets) for _ in plans]
            for part in self._parts():
                logits = self._logits(self.hidden, part, chunk)
                weights = (logits - dense.largest.float()[:, None]).exp_()
                for planned, streams in zip(of_chunk, plans, strict=True):
                    own = self._logits(streams, part, chunk)
                    planned.compare(own, logits, weights)
                    planned.add(own, part.first, targets)
            for so_far, planned in zip(found, of_chunk, strict=True):
                so_far.append(planned.joined(self.lm.comm))
        return [self._tally(of_plan) for of_plan in found]

    @torch.no_grad()
    def _predicted(self, chunk: slice) -> Predictions:
        targets = self.targets[chunk]
        dense = Predictions.none_yet(targets)
        dense.least_change = dense.most_change = dense.change  # 0: from itself it does not differ
        for part in self._parts():
            dense.add(self._logits(self.hidden, part, chunk), part.first, targets)
        return dense.joined(self.lm.comm)

    def _parts(self) -> Iterator[VocabularyPart]:
        return self.lm.head.parts(self.part)

    def _logits(self, streams: Tensor, part: VocabularyPart, chunk: slice) -> Tensor:
        hidden = streams[part.rank if len(streams) > 1 else 0, chunk]
        return self.lm.scaled_logits(part.logits(hidden)).float()

    def _tally(self, planned: Sequence[Predictions]) -> Tally:
        tally, rows = Tally(), []
        for chunk, dense, own in zip(self.chunks, self.dense, planned, strict=True):
            found, largest = token_metrics(dense, own, self.targets[chunk])
            rows.append(found.cpu())
            tally.max_abs_logprob_diff = max(tally.max_abs_logprob_diff, largest)
        tally.tokens = [length - 1 for length in self.lengths]
        tally.sums = [of_sequence.sum(0) for of_sequence in torch.cat(rows).split(tally.tokens)]
        return tally
