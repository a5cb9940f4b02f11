"""Measuring the planned model as a whole, as often as asked, on text that nothing is fitted on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spd_calib.parallel.model import Recording
from spd_calib.parallel.routing import Chosen, tokens_routed_alike, watching_routers
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


class HeldOut:
    """The planned model on sequences of token ids, against the dense model."""

    def __init__(self, model: PlannedModel, sequences: Sequence[Sequence[int]], *, batch_size: int = 8):
        self.model, self.sequences, self.batch_size = model, sequences, batch_size
        lm = model.lm
        size = sum(map(len, sequences)) * lm.blocks[0].width * (lm.num_blocks + 2) * 4
        self._cached = list(self._recorded()) if size < CACHED_BYTES else None

    def _recorded(self) -> Iterator[_RecordedBatch]:
        for input_ids, lengths in batches(self.sequences, self.batch_size, self.model.lm.device):
            with watching_routers(self.model.lm.blocks) as experts:
                recording = self.model.lm.record(input_ids)
            yield _RecordedBatch(input_ids, lengths, recording, experts)

    @torch.no_grad()
    def measure(self) -> Tally:
        """Measure the planned model as it is at the moment."""
        tally = Tally()
        for batch in self._cached or self._recorded():
            reference = Reference(
                self.model.lm, batch.recording.final, input_ids=batch.input_ids, lengths=batch.lengths
            )
            with watching_routers(self.model.blocks) as experts:
                final = self.model.run(batch.recording)
            (found,) = reference.compare([reference.streams(final)])
            found.routed = tokens_routed_alike(batch.experts, experts, reference.predicting)
            tally.add(found)
        return tally


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
