"""The report of a recovery: all that was tried, and what came of it."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spd_calib.formats.common import Tier
from spd_calib.formats.recovery import Attempt, Recovery
from spd_calib.sensitivity.metrics import Tally
from spd_calib.sensitivity.text import Fitted

from .held_out import kl_fall

TOGETHER = "all without training"  # what was done in closed form, to all blocks, as one treatment

GIVEN_BACK = "given back"  # to the dense model, since the whole broke its budget
DENSE_AGAIN = "dense weights again"  # for the same reason, in a block with all heads on every rank: it stays dropped
REPLICATED = "heads replicated"  # of other ranks, on every rank, in a block of the dense model


def judged_by_whole(
    block: int | None, treatment: str, before: Tally, after: Tally, *, began: float, detail: dict | None = None
) -> Attempt:
    """Return the attempt that took the whole plan from `before` to `after`; it is kept where its KL fell for certain.

    `began` is when it was begun, by time.monotonic.
    """
    fell, error = kl_fall(before, after)
    return Attempt(
        block=block,
        treatment=treatment,
        kl_before=_finite(before.kl()),
        kl_after=_finite(after.kl()),
        fell=_finite(fell),
        fell_stderr=_finite(error),
        kept=fell > error,
        seconds=time.monotonic() - began,
        detail=_finite(detail or {}),
    )


def judged_by_error(
    block: int, treatment: str, before: float, after: float, *, least: float, began: float, detail: dict
) -> Attempt:
    """Return the attempt that took the error at the block's output from `before` to `after`.

    It is kept where that fell by more than `least`.
    """
    return Attempt(
        block=block,
        treatment=treatment,
        kept=before - after > least,
        seconds=time.monotonic() - began,
        detail=_finite({"error_before": before, "error_after": after, **detail}),
    )


def _finite(value: Any) -> Any:
    """Return a JSON value with None in place of every number that is not finite: JSON has none of those."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


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

    def document(self, *, tiers_from: str, documents: Fitted) -> Recovery:
        """Return what recovery.json is to hold; `documents`, as Text.documents, are those fitted on or judged by."""
        tiers = {str(block): tier for block, tier in self.tiers.items()}
        return Recovery(
            tiers=tiers,
            tiers_from=tiers_from,
            kl_as_is=self.kl_as_is,
            kl=self.kl,
            attempts=list(self.attempts),
            documents=dict(documents),
        )
