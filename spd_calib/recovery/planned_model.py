"""The dense model and, beside it, the planned one: the same blocks, but for those the plan changes.

The dense model stays what it was, so that every treatment is measured against it. A treated block is a copy of the
dense layer with its own weights; everything else is shared.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spd_calib.formats.drops import NOTHING_DROPPED, Drops
from spd_calib.models.architecture import find_decoder
from spd_calib.parallel.block import Block
from spd_calib.parallel.comm import SimulatedComm
from spd_calib.parallel.model import Recording, TensorParallelLM
from spd_calib.parallel.streams import Streams

from .parked import ParkedStudents
from .student import Student


class PlannedModel:
    """A model (which is changed for good) on `tp` simulated ranks, dense and planned side by side.

    `lm` is the dense model; `students`, by block, are the blocks that the planned one has in place of its own. Of a
    model that is read from disk block by block, `hold` brings a block's weights into memory (stream_load).
    """

    def __init__(self, model: PreTrainedModel, tp: int, drops: Drops, *, hold: Callable[[int], None] | None = None):
        decoder = find_decoder(model)
        assert decoder is not None
        self._decoder, self._layers = decoder, decoder.layers
        self._norm, self._head = getattr(decoder.owner, decoder.norm), model.get_output_embeddings()
        self.lm = TensorParallelLM(model.requires_grad_(False), SimulatedComm(tp), sharded=hold is not None)
        if hold is not None:
            self.lm.read_blocks_by(hold)
        self._parked = ParkedStudents()
        drops = self.lm.fitted(drops)
        # until it is treated, a student shares the dense layer's weights
        self.students = {i: self.as_dense(i, drops) for i in sorted({p.block for p in drops})}

    @property
    def drops(self) -> Drops:
        """Return what the planned model drops, with the predictors that its students have."""
        return Drops({point: drop for s in self.students.values() for point, drop in s.drops.by_point.items()})

    @property
    def blocks(self) -> list[Block]:
        """Return the blocks of the planned model, in order."""
        return [self.students[b.index].block if b.index in self.students else b for b in self.lm.blocks]

    def as_dense(self, block: int, drops: Drops) -> Student:
        """Return a student that runs the dense model's weights of a block; of `drops` those at its own sync points."""
        like = self.lm.blocks[block]
        student = Student.of(self._layers[block], like, drops)
        student.block.read_weights = like.read_weights
        return student

    def is_dense(self, student: Student) -> bool:
        """Say whether a student runs the dense model's weights, not weights of its own."""
        return student.layer is self._layers[student.index]

    def park(self, student: Student, read: Callable[[], Mapping[str, Tensor]]) -> None:
        """Hold a student's weights no longer than it runs, if the model is read from disk.

        `read` returns its state, as it was written down.
        """
        if self.lm.streamed and not self.is_dense(student):
            self._parked.park(student, read)

    @torch.no_grad()
    def round_to(self, dtype: torch.dtype) -> None:
        """Round the students' weights to what `dtype` holds; they keep their own dtype.

        Of a model that is read from disk those of dense layers are in that form already.
        """
        self._parked.round_to(dtype)
        for student in self.students.values():
            on_disk = student.block.read_weights is not None
            for p in student.layer.parameters():
                if not (on_disk and p.dim() > 1):
                    p.copy_(p.to(dtype))

    def put(self, student: Student) -> Student:
        """Take a student into the planned model; return the one it replaces."""
        before = self.students[student.index]
        self.students[student.index] = student
        return before

    def run_block(self, index: int, streams: Streams, **kwargs) -> Streams:
        """Run one block of the planned model."""
        student = self.students.get(index)
        block, drops = (self.lm.blocks[index], NOTHING_DROPPED) if student is None else (student.block, student.drops)
        return block.run(streams, drops, **kwargs)

    def run(self, recording: Recording) -> Tensor:
        """Run a batch that was recorded on the dense model; return what leaves the planned one's final norm.

        That is as TensorParallelLM.resume returns it.
        """
        first = min(self.students, default=None)
        if first is None:
            return recording.final
        s = recording.streams[first]
        for index in range(first, self.lm.num_blocks):
            s = self.run_block(index, s, **recording.kwargs[index])
        return self.lm.final_norm(s)

    def restored(self) -> PreTrainedModel:
        """Return the transformers model with the students' weights in it. The dense weights are gone afterwards."""
        for i, student in self.students.items():
            if not self.is_dense(student):
                self._layers[i].load_state_dict(student.layer.state_dict())
        return self._with_its_layers()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what `restored` would hold, by name, block after block, in memory one block at a time.

        The model runs no more once this is called.
        """
        model, paths = self._with_its_layers(), self.lm.module_paths
        return itertools.chain(self._weights_of_blocks(), _outside(model, paths))

    def _weights_of_blocks(self) -> Iterator[tuple[str, Tensor]]:
        for block, layer, path in zip(self.blocks, self._layers, self.lm.module_paths, strict=True):
            block.hold_weights()
            own = self.students[block.index].layer if block.index in self.students else layer
            for name, tensor in own.state_dict().items():
                yield f"{path}.{name}", tensor

    def _with_its_layers(self) -> PreTrainedModel:
        """Return the transformers model with the dense layers, its norm and its head in their places."""
        self._decoder.owner.layers = self._layers
        setattr(self._decoder.owner, self._decoder.norm, self._norm)
        self.lm.model.set_output_embeddings(self._head)
        return self.lm.model


def _outside(model: PreTrainedModel, blocks: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights that are in none of the `blocks`, by their paths."""
    inside = tuple(f"{path}." for path in blocks)
    for name, tensor in model.state_dict().items():
        if not name.startswith(inside):
            yield name, tensor
