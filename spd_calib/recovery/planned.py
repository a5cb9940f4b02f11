"""The dense model and, beside it, the planned one: the same blocks, but for those the plan changes.

The dense model stays what it was, so that every treatment is measured against it. A treated block is a copy of the
dense layer with its own weights; everything else is shared.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spd_calib.formats.common import Strategy
from spd_calib.models.architecture import HeadCounts, find_decoder, layer_parts
from spd_calib.parallel.block import Block
from spd_calib.parallel.comm import Comm, Simulated
from spd_calib.parallel.compensation import Compensation
from spd_calib.parallel.model import Recording, TensorParallelLM
from spd_calib.parallel.streams import Streams
from spd_calib.sensitivity.measure import batches, compare
from spd_calib.sensitivity.metrics import FIELDS, Tally

CACHED_BYTES = 2**30  # of the dense model's hidden states on held-out text; beyond that they are computed anew


class Student:
    """One block of the planned model with its own weights: a decoder layer, and the Block that runs it on the ranks."""

    def __init__(self, layer: nn.Module, dense: Block, attention: Strategy, mlp: Strategy):
        parts = layer_parts(layer)
        assert parts is not None, "the dense layer was accepted"
        self.layer, self.parts = layer, parts
        self.counts = HeadCounts.of(parts)
        self.block = Block(dense.index, dense.num_blocks, parts, dense.comm)
        self.block.attention_strategy, self.block.mlp_strategy = attention, mlp

    def copy(self) -> "Student":
        """Another one with weights and predictors of its own."""
        block = self.block
        other = Student(copy.deepcopy(self.layer), block, block.attention_strategy, block.mlp_strategy)
        if block.compensation is not None:
            other.block.set_compensation(dict(enumerate(copy.deepcopy(self.compensation or []))))
        return other

    @property
    def compensation(self) -> list[Compensation] | None:
        return None if self.block.compensation is None else list(self.block.compensation)  # type: ignore[arg-type]

    def state(self) -> dict[str, Tensor]:
        """Weights and predictors, by name; `load` takes them back."""
        tensors = {f"layer.{name}": t for name, t in self.layer.state_dict().items()}
        for rank, c in enumerate(self.compensation or []):
            tensors |= {f"compensation.{rank}.{name}": t for name, t in c.named_parameters()}
        return {name: t.detach().cpu().contiguous() for name, t in tensors.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        prefix = "layer."
        self.layer.load_state_dict({n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)})
        ranks: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("compensation."):
                _, rank, part = name.split(".")
                ranks.setdefault(int(rank), {})[part] = tensor.clone()
        self.block.set_compensation({r: Compensation(**parts) for r, parts in ranks.items()} or None)


@dataclass(frozen=True)
class _Held:
    input_ids: Tensor
    lengths: list[int]
    recording: Recording


class PlannedModel:
    """`model` (which is changed for good) on `tp` simulated ranks, dense and planned side by side."""

    def __init__(self, model: PreTrainedModel, tp: int, attention: Sequence[Strategy], mlp: Sequence[Strategy]):
        decoder, head = find_decoder(model), model.get_output_embeddings()
        assert decoder is not None
        self._layers, self._norm, self._head = decoder.layers, getattr(decoder.owner, decoder.norm), head
        self._decoder = decoder
        self.lm = TensorParallelLM.simulated(model.requires_grad_(False), tp)
        self.attention, self.mlp = tuple(attention), tuple(mlp)
        keep = Strategy.KEEP_SYNC
        pairs = zip(attention, mlp, strict=True)
        # until it is treated, a student shares the dense layer's weights
        self.students = {
            i: Student(self._layers[i], self.lm.blocks[i], *pair)
            for i, pair in enumerate(pairs)
            if pair != (keep, keep)
        }

    @property
    def blocks(self) -> list[Block]:
        return [self.students[b.index].block if b.index in self.students else b for b in self.lm.blocks]

    def student_of(self, block: int) -> Student:
        """A copy of a block's present student to try a treatment on; `put` takes it into the plan."""
        return self.students[block].copy()

    def put(self, student: Student) -> Student:
        """Take a student into the plan; returns the one it replaces."""
        before = self.students[student.block.index]
        self.students[student.block.index] = student
        return before

    def run(self, recording: Recording) -> Tensor:
        """What leaves the final norm of the planned model, from what entered the dense one's blocks."""
        first = min(self.students, default=len(self.lm.blocks))
        if first == len(self.lm.blocks):
            return recording.final
        s = recording.streams[first]
        for block, kwargs in zip(self.blocks[first:], recording.kwargs[first:], strict=True):
            s = block(s, **kwargs)
        return self.lm.final_norm(s)

    def logits(self, final: Tensor) -> Tensor:
        self.lm.head.streams_differ = Strategy.PLAIN_DROP in self.attention
        logits = self.lm.head(final)
        self.lm.head.streams_differ = False
        return logits

    def restored(self) -> PreTrainedModel:
        """The transformers model with the students' weights in it. The dense weights are gone afterwards."""
        for i, student in self.students.items():
            if student.layer is not self._layers[i]:
                self._layers[i].load_state_dict(student.layer.state_dict())
        self._decoder.owner.layers = self._layers
        setattr(self._decoder.owner, self._decoder.norm, self._norm)
        self.lm.model.set_output_embeddings(self._head)
        return self.lm.model


class HeldOut:
    """Text that nothing is fitted on, and the planned model measured on it, as a whole, as often as asked."""

    def __init__(self, model: PlannedModel, sequences: Sequence[Sequence[int]], batch_size: int = 8):
        self.model, self.sequences, self.batch_size = model, sequences, batch_size
        lm = model.lm
        width = lm.blocks[0].width
        size = sum(map(len, sequences)) * width * (lm.num_blocks + 2) * 4
        self._cached = list(self._recordings()) if size < CACHED_BYTES else None

    def _recordings(self):
        for input_ids, lengths in batches(self.sequences, self.batch_size, self.model.lm.device):
            yield _Held(input_ids, lengths, self.model.lm.record(input_ids))

    @torch.no_grad()
    def measure(self) -> Tally:
        """The plan as it stands against the dense model."""
        tally = Tally()
        differ = Strategy.PLAIN_DROP in self.model.attention
        for held in self._cached or self._recordings():
            final = self.model.run(held.recording)
            compare(self.model.lm, held.recording.final, final, differ, held.input_ids, held.lengths, tally)
        self.model.lm.head.streams_differ = False
        return tally


def fall(before: Tally, after: Tally) -> tuple[float, float]:
    """By how much KL per token fell between two measurements on the same sequences, and its standard error.

    The difference is taken sequence by sequence: what makes one sequence harder than another cancels. As in
    `sensitivity.metrics`, a ratio over unequal lengths with the delta method's error.
    """
    column = FIELDS.index("kl")
    n = torch.tensor(before.tokens, dtype=torch.float64)
    s = torch.stack(before.sums)[:, column] - torch.stack(after.sums)[:, column]
    mean = (s.sum() / n.sum()).item()
    m = len(n)
    squares = (s - mean * n).pow(2).sum().item()
    return mean, math.sqrt(m / (m - 1) * squares) / n.sum().item() if m > 1 else 0.0


@dataclass
class Batch:
    """One batch of the text that is fitted on, on its way through both models."""

    dense: Tensor  # [B, T, d], entering the present block of the dense model
    planned: Streams  # entering the present block of the planned one
    kwargs: list[dict]  # of every block
    mask: Tensor  # [B, T], True at real tokens
    final: Tensor  # leaving the dense model's final norm


class Feed:
    """What enters one block after the other, in the dense and in the planned model; moves on block by block.

    Holds 3 hidden states a token (4 while a block is distilled), whatever the number of blocks. Of several `replicas`
    each holds its share of every batch: every so-manieth row, or, where none is left for it, a row without a token.
    """

    def __init__(
        self,
        model: PlannedModel,
        sequences: Sequence[Sequence[int]],
        batch_size: int = 8,
        replicas: Comm | None = None,
    ):
        self.model, self.index = model, 0
        self.replicas = replicas or Simulated(1)
        self.batches: list[Batch] = []
        for all_ids, all_lengths in batches(sequences, batch_size, model.lm.device):
            rows = list(range(self.replicas.ranks[0], len(all_lengths), self.replicas.size))
            input_ids, lengths = all_ids[rows or [0]], [all_lengths[row] for row in rows] or [0]
            recording = model.lm.record(input_ids)
            mask = torch.arange(input_ids.shape[1], device=input_ids.device) < torch.tensor(lengths)[:, None].to(
                input_ids.device
            )
            x = recording.streams[0].shared
            self.batches.append(Batch(x, Streams(x), recording.kwargs, mask, recording.final))

    def inputs(self, batch: Batch, own: bool) -> Streams:
        """What a student is shown: the planned model's own stream (errors of earlier blocks included) or the dense."""
        return batch.planned if own else Streams(batch.dense)

    @torch.no_grad()
    def dense_output(self, batch: Batch) -> Tensor:
        return self.model.lm.blocks[self.index](batch.dense, **batch.kwargs[self.index]).shared

    @torch.no_grad()
    def advance(self) -> None:
        """Through the present block of both models."""
        i = self.index
        for batch in self.batches:
            batch.dense = self.dense_output(batch)
            batch.planned = self.model.blocks[i](batch.planned, **batch.kwargs[i])
        self.index += 1

    def move_to(self, block: int) -> None:
        while self.index < block:
            self.advance()
