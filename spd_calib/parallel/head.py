"""From the ranks' streams to logits: the final norm, and an output head cut over the vocabulary."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spd_calib.models.shard import ALL, is_cut, vocabulary_slice

from .comm import Comm
from .streams import Streams


class PerRank(Tensor):
    """Hidden states [ranks * B, T, d] that differ from rank to rank, one rank's behind the other's.

    The type tells the output head that it has to take the ranks apart. It survives what transformers does with the
    hidden states on the way there, such as keeping only the last positions (logits_to_keep).
    """


class FinalNorm(nn.Module):
    """Applies the model's final norm to the ranks' streams: [B, T, d], or PerRank where they differ."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm

    def forward(self, s: Streams) -> Tensor:
        assert s.settled, "the last block settles every debt"
        if s.written_off is None:
            return self.norm(s.shared)
        return torch.cat([self.norm(s.read(i)) for i in range(len(s.written_off))]).as_subclass(PerRank)


@dataclass(frozen=True)
class VocabularyPart:
    """Consecutive tokens of the vocabulary, from id `first` on, whose logits one rank computes."""

    rank: int  # index among the ranks of this process
    first: int
    weight: Tensor  # [tokens, d]
    bias: Tensor | None

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [N, tokens] of the rank's hidden states [N, d]."""
        return nn.functional.linear(hidden, self.weight, self.bias)


class VocabParallelHead(nn.Module):
    """An output head of which each rank computes a contiguous part from its own stream; the last may be shorter."""

    def __init__(self, head: nn.Linear, comm: Comm):
        super().__init__()
        self.weight, self.bias, self.comm = head.weight, head.bias, comm
        self.vocab_size = head.out_features
        own = [vocabulary_slice(self.vocab_size, rank=rank, tp=comm.size) for rank in comm.ranks]
        self.rows = [ALL] if is_cut(head) else own  # of the weight held here: a slice for each rank of this process
        self.first = [rows.start for rows in own]  # token id of each of these ranks
        self.width = -(-self.vocab_size // comm.size)

    def of_dtype(self, dtype: torch.dtype) -> "VocabParallelHead":
        """Return the same head with a copy of its weights in this dtype."""
        return copy.deepcopy(self, {id(self.comm): self.comm}).to(dtype)

    def cut_at(self, rows: Sequence[slice]) -> None:
        """Cut the vocabulary at `rows`, one slice for each rank, from now on.

        Where streams differ, logits depend on which rank computes which part: this is how they are compared with an
        engine that cuts the vocabulary elsewhere.
        """
        self.rows = list(rows)
        self.first = [part.start for part in rows]

    def parts(self, size: int) -> Iterator[VocabularyPart]:
        """Yield what the ranks of this process compute, at most `size` tokens of the vocabulary at a time."""
        for rank, (rows, first) in enumerate(zip(self.rows, self.first, strict=True)):
            weight, bias = self.weight[rows], None if self.bias is None else self.bias[rows]
            for start in range(0, len(weight), size):
                some = slice(start, start + size)
                yield VocabularyPart(rank, first + start, weight[some], None if bias is None else bias[some])

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits [B, T, V] for hidden [B, T, d], or for PerRank."""
        ranks = len(self.rows)
        streams = hidden.as_subclass(Tensor).chunk(ranks) if isinstance(hidden, PerRank) else [hidden] * ranks
        parts = [
            nn.functional.linear(h, self.weight[rows], None if self.bias is None else self.bias[rows])
            for h, rows in zip(streams, self.rows, strict=True)
        ]
        # padded to one width; only the last ranks' parts can be narrower, so the padding ends up behind the vocabulary
        width = max(self.width, *(part.shape[-1] for part in parts))
        padded = [p if p.shape[-1] == width else nn.functional.pad(p, (0, width - p.shape[-1])) for p in parts]
        return self.comm.all_gather(padded)[..., : self.vocab_size].contiguous()
