"""The dense model and, beside it, the planned one: the same blocks, but for those the plan changes.

The dense model stays what it was, so that every treatment is measured against it. A treated block is a copy of the
dense layer with its own weights; everything else is shared.
"""

from torch import Tensor
from transformers import PreTrainedModel

from spd_calib.formats.drops import NOTHING_DROPPED, Drops
from spd_calib.models.architecture import find_decoder
from spd_calib.parallel.block import Block
from spd_calib.parallel.model import Recording, TensorParallelLM
from spd_calib.parallel.streams import Streams

from .student import Student


class PlannedModel:
    """A model (which is changed for good) on `tp` simulated ranks, dense and planned side by side.

    `lm` is the dense model; `students`, by block, are the blocks that the planned one has in place of its own.
    """

    def __init__(self, model: PreTrainedModel, tp: int, drops: Drops):
        decoder = find_decoder(model)
        assert decoder is not None
        self._decoder, self._layers = decoder, decoder.layers
        self._norm, self._head = getattr(decoder.owner, decoder.norm), model.get_output_embeddings()
        self.lm = TensorParallelLM.simulated(model.requires_grad_(False), tp)
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
        return Student.of(self._layers[block], self.lm.blocks[block], drops)

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
            if student.layer is not self._layers[i]:
                self._layers[i].load_state_dict(student.layer.state_dict())
        self._decoder.owner.layers = self._layers
        setattr(self._decoder.owner, self._decoder.norm, self._norm)
        self.lm.model.set_output_embeddings(self._head)
        return self.lm.model
