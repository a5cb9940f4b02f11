"""The report of a recovery: all that was tried, and what came of it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from spd_calib.sensitivity.tiers import Tier

REPORT_FILE = "recovery.json"  # in the checkpoint's folder
TOGETHER = "all without training"  # what was done in closed form, to all blocks, as one treatment

GIVEN_BACK = "given back"  # to the dense model, since the whole broke its budget
DENSE_AGAIN = "dense weights again"  # for the same reason, in a block with all heads on every rank: it stays dropped
REPLICATED = "heads replicated"  # of other ranks, on every rank, in a block of the dense model


@dataclass(frozen=True)
class Attempt:
    """One treatment tried. `block` is None where it is of all treated blocks.

    What is done to a block without training is judged by the error at its output, in `detail`; it has no KL.
    """

    block: int | None
    treatment: str
    kl_before: float | None
    kl_after: float | None
    fell: float | None
    fell_stderr: float | None
    kept: bool
    seconds: float
    detail: dict = field(default_factory=dict)


@dataclass(frozen=True)
class RecoveryReport:
    """The tier of each dropped block, the KL of the whole plan before and after, and everything tried in between."""

    tiers: Mapping[int, Tier]
    kl_as_is: float
    kl: float
    attempts: Sequence[Attempt]

    def of(self, block: int) -> list[Attempt]:
        """Return what was tried on a block, alone or with others that were trained with it."""
        return [a for a in self.attempts if a.block == block or block in a.detail.get("blocks", ())]

    def json(self) -> dict:
        """Return the report as JSON values, as recovery.json holds it."""
        return {**asdict(self), "tiers": {str(b): t for b, t in self.tiers.items()}}


def read_attempts(checkpoint: Path) -> list[Attempt]:
    """Return what was tried on a checkpoint, from the report in its folder."""
    return [Attempt(**a) for a in json.loads((checkpoint / REPORT_FILE).read_text(encoding="utf-8"))["attempts"]]
