"""Measuring the planned model as a whole, as often as asked, on text that nothing is fitted on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spd_calib.formats.drops import NOTHING_DROPPED
from spd_calib.parallel.model import Recording
from spd_calib.parallel.routing import Chosen, tokens_routed_alike, watching_routers
from spd_calib.parallel.streams import Streams
from spd_calib.sensitivity.measure import batches
from spd_calib.sensitivity.metrics import Tally
from spd_calib.sensitivity.predictions import FIELDS
from spd_calib.sensitivity.reference import Reference
from spd_calib.sensitivity.standard_error import ratio_and_stderr

from .planned_model import PlannedModel

CACHED_BYTES = 2**30  # of the dense model's hidden states; beyond that they are computed anew for each measurement


@dataclass(frozen=True)
class _RecordedBatch:
    input_ids: Tensor
    lengths: list[int]
    recording: Recording
    experts: Chosen  # of the dense model


@dataclass(eq=False)
class _Carried:
    """A batch on its way through the dense (first) and the planned model: streams, and experts chosen so far."""

    input_ids: Tensor  # [B, T]
    lengths: list[int]
    kwargs: list[dict]  # of every block
    streams: tuple[Streams, Streams]
    experts: tuple[dict[int, Tensor], dict[int, Tensor]]


@dataclass(frozen=True)
class _Run:
    """A batch that was run through the dense (first) and the planned model: what leaves the final norm, and experts."""

    input_ids: Tensor
    lengths: list[int]
    final: tuple[Tensor, Tensor]
    experts: tuple[Chosen, Chosen]


class HeldOut:
    """The planned model on sequences of token ids, against the dense model.

    The batches of a model that is read from disk go through its blocks together, so each is read once.
    """

    def __init__(self, model: PlannedModel, sequences: Sequence[Sequence[int]], *, batch_size: int = 8):
        self.model, self.sequences, self.batch_size = model, sequences, batch_size
        lm = model.lm
        size = sum(map(len, sequences)) * lm.blocks[0].width * (lm.num_blocks + 2) * 4
        self._cached = list(self._recorded()) if size < CACHED_BYTES and not lm.streamed else None

    @torch.no_grad()
    def measure(self) -> Tally:
        """Measure the planned model as it is at the moment."""
        tally = Tally()
        for run in self._in_lockstep() if self.model.lm.streamed else self._resumed():
            dense, planned = run.final
            reference = Reference(self.model.lm, dense, input_ids=run.input_ids, lengths=run.lengths)
            (found,) = reference.compare([reference.streams(planned)])
            found.routed = tokens_routed_alike(*run.experts, reference.predicting)
            tally.add(found)
        return tally

    def _recorded(self) -> Iterator[_RecordedBatch]:
        for input_ids, lengths in self._batches():
            with watching_routers(self.model.lm.blocks) as experts:
                recording = self.model.lm.record(input_ids)
            yield _RecordedBatch(input_ids, lengths, recording, experts)

    def _resumed(self) -> Iterator[_Run]:
        for batch in self._cached or self._recorded():
            with watching_routers(self.model.blocks) as experts:
                final = self.model.run(batch.recording)
            yield _Run(batch.input_ids, batch.lengths, (batch.recording.final, final), (batch.experts, experts))

    def _in_lockstep(self) -> Iterator[_Run]:
        lm, carried = self.model.lm, list[_Carried]()
        for input_ids, lengths in self._batches():
            x, kwargs = lm.enter(input_ids)
            carried.append(_Carried(input_ids, lengths, kwargs, (Streams(x), Streams(x)), ({}, {})))
        for index in range(lm.num_blocks):
            for batch in carried:
                self._carry(batch, index)
        for batch in carried:
            dense, planned = map(lm.final_norm, batch.streams)
            if not dense.isfinite().all():
                lm.refuse_nonfinite(batch.input_ids)
            yield _Run(batch.input_ids, batch.lengths, (dense, planned), batch.experts)

    def _carry(self, batch: _Carried, index: int) -> None:
        """Run one block of both models; up to the first block that the plan changes they are one."""
        (dense, planned), kwargs = batch.streams, batch.kwargs[index]
        apart = index >= min(self.model.students, default=self.model.lm.num_blocks)
        if apart:
            with watching_routers([self.model.blocks[index]]) as experts:
                planned = self.model.run_block(index, planned, **kwargs)
            batch.experts[1].update(experts)
        with watching_routers([self.model.lm.blocks[index]]) as experts:
            dense = self.model.lm.blocks[index].run(dense, NOTHING_DROPPED, **kwargs)
        batch.experts[0].update(experts)
        batch.streams = (dense, planned if apart else dense)

    def _batches(self) -> Iterator[tuple[Tensor, list[int]]]:
        return batches(self.sequences, self.batch_size, self.model.lm.device)


def kl_fall(before: Tally, after: Tally) -> tuple[float, float]:
    """Return by how much KL per token fell between two measurements on the same sequences, and its standard error.

    The difference is taken sequence by sequence: what makes one sequence harder than another cancels. It takes two
    sequences at least.
    """
    column = FIELDS.index("kl")
    fell = torch.stack(before.sums)[:, column] - torch.stack(after.sums)[:, column]
    mean, stderr = ratio_and_stderr(fell, torch.tensor(before.tokens, dtype=torch.float64))
    assert stderr is not None, "recovery refuses to judge by a single sequence"
    return mean.item(), stderr.item()
