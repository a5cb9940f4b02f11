"""The text that is fitted on, as it enters one block after the other in the dense and in the planned model.

With `starts`, the text is also begun anew at many of its tokens. The first token of a sequence is what all others look
at (attention sinks), whatever it is: where the planned model makes nothing of it, the whole sequence is lost. In text
without a BOS every token may be the first one, and a text has few first tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spd_calib.formats.drops import KEPT
from spd_calib.parallel.comm import Comm, SimulatedComm
from spd_calib.parallel.streams import Streams
from spd_calib.sensitivity.measure import batches

from .planned_model import PlannedModel

STARTS, START = 16, 4  # starts for each sequence, and their tokens


@dataclass(eq=False)
class Batch:
    """One batch on its way through both models."""

    dense: Tensor  # [B, T, d], entering the present block of the dense model
    planned: Streams  # entering the present block of the planned one
    kwargs: list[dict]  # of every block
    mask: Tensor  # [B, T], True at real tokens
    input_ids: Tensor  # [B, T]
    final: Tensor | None = None  # leaving the dense model's final norm, once asked for
    read: Tensor | None = None  # [B, T, d], what the dense model's MLP reads in the present block, before its norm
    output: Tensor | None = None  # [B, T, d], leaving the present block of the dense model; both once asked for
    starts: "Batch | None" = None  # sequences of START tokens that begin at tokens of this batch
    weight: float = 1.0  # of each of its tokens


class Feed:
    """The batches in front of the present block, `index`, of both models; moves on block by block.

    Holds 3 hidden states a token (5 while a block is refitted or distilled), whatever the number of blocks. With
    `own_inputs` a student is shown the planned model's own stream, errors of earlier blocks included, else the dense
    model's.

    Each of several `replicas` (processes that train together) holds its share of every batch: rows r, r + n, r + 2n ...
    of the r-th of n replicas, or, where none is left for it, one row without a real token.
    """

    def __init__(
        self,
        model: PlannedModel,
        sequences: Sequence[Sequence[int]],
        *,
        batch_size: int = 8,
        own_inputs: bool = True,
        replicas: Comm | None = None,
        starts: bool = False,
    ):
        self.model, self.index, self.own_inputs = model, 0, own_inputs
        self.replicas = replicas or SimulatedComm(1)
        self.batches: list[Batch] = []
        starts = starts and len({ids[0] for ids in sequences}) > 1  # with a BOS all begin alike
        for all_ids, all_lengths in batches(sequences, batch_size, model.lm.device):
            rows = list(range(self.replicas.ranks[0], len(all_lengths), self.replicas.size))
            input_ids, lengths = all_ids[rows or [0]], [all_lengths[row] for row in rows] or [0]
            batch = self._entering(input_ids, lengths)
            if starts and len(begun := _begun_anew(input_ids, lengths)):
                batch.starts = self._entering(begun, [START] * len(begun))
                batch.starts.weight = len(rows) / len(begun)  # together they count as the first tokens there are
            self.batches.append(batch)

    def _entering(self, input_ids: Tensor, lengths: Sequence[int]) -> Batch:
        """Return a batch in front of the first block, token ids [B, T], of which so many of each row are real."""
        (x, kwargs), device = self.model.lm.enter(input_ids), input_ids.device
        mask = torch.arange(input_ids.shape[1], device=device) < torch.tensor(lengths, device=device)[:, None]
        return Batch(x, Streams(x), kwargs, mask, input_ids)

    @property
    def fitting(self) -> list[Batch]:
        """Return the batches to fit and train on: all but the last eighth."""
        return self.batches[: -len(self.choosing)]

    @property
    def choosing(self) -> list[Batch]:
        """Return the batches to choose by (ridges, orders of heads, the best step of training): the last eighth."""
        return self.batches[-max(1, len(self.batches) // 8) :]

    @property
    def regressed(self) -> tuple[list[Batch], list[Batch]]:
        """Return the batches to fit and to choose by, each with its starts, whose tokens have weights."""
        return with_starts(self.fitting), with_starts(self.choosing)

    def some(self, tokens: int) -> list[Batch]:
        """Return the first batches to fit on that hold so many tokens together, at least one."""
        found, held = list[Batch](), 0
        for batch in self.fitting:
            if found and held + batch.mask.numel() > tokens:
                break
            found.append(batch)
            held += batch.mask.numel()
        return found

    def inputs(self, batch: Batch) -> Streams:
        """Return what a student of the present block is shown."""
        return batch.planned if self.own_inputs else Streams(batch.dense)

    def kwargs(self, batch: Batch) -> dict:
        """Return what the present block takes beside the streams."""
        return batch.kwargs[self.index]

    def dense_final(self, batch: Batch) -> Tensor:
        """Return what leaves the dense model's final norm, [B, T, d]; kept.

        Raises InputError that names the block where NaN or Inf first appears, if any does.
        """
        if batch.final is None:
            batch.final = self.model.lm.record(batch.input_ids).final
        return batch.final

    def dense_output(self, batch: Batch) -> Tensor:
        """Return what leaves the present block of the dense model, [B, T, d]; kept until the feed moves on."""
        self._run_dense(batch)
        assert batch.output is not None
        return batch.output

    def dense_read(self, batch: Batch) -> Tensor:
        """Return what the MLP of the present block reads in the dense model, before its norm, [B, T, d]; kept, too."""
        self._run_dense(batch)
        assert batch.read is not None
        return batch.read

    @torch.no_grad()
    def _run_dense(self, batch: Batch) -> None:
        if batch.output is not None:
            return
        block, s = self.model.lm.blocks[self.index], Streams(batch.dense)
        read, _ = block.behind_attention(KEPT, s, *block.attend(s, **self.kwargs(batch)))
        output = block.behind_mlp(KEPT, read, block.feed(read))
        batch.read, batch.output = read.shared, output.shared

    @torch.no_grad()
    def advance(self) -> None:
        """Move all batches through the present block of both models.

        Raises InputError where NaN or Inf leaves the dense one.
        """
        for batch in with_starts(self.batches):
            batch.planned = self.model.run_block(self.index, batch.planned, **self.kwargs(batch))
            batch.dense, batch.read, batch.output = self.dense_output(batch), None, None
            if not batch.dense.isfinite().all():
                self.model.lm.refuse_nonfinite(batch.input_ids)
        self.index += 1

    def move_to(self, block: int) -> None:
        """Move on until `block` is the present one; a block behind it stays behind."""
        while self.index < block:
            self.advance()


def with_starts(batches: Sequence[Batch]) -> list[Batch]:
    """Return the batches, each followed by its starts, if it has any."""
    return [b for batch in batches for b in (batch, batch.starts) if b is not None]


def _begun_anew(input_ids: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return sequences of START tokens [N, START] from all over those given; none of those that are no longer."""
    rows = [
        ids[at : at + START]
        for ids, length in zip(input_ids, lengths, strict=True)
        if length > START
        for at in torch.linspace(1, length - START, STARTS).long().unique().tolist()
    ]
    return torch.stack(rows) if rows else input_ids[:0]
