"""A model of how long a step takes with some sync points dropped: what an all-reduce is worth on a machine.

    step = max(bytes moved / memory rate, FLOPs / arithmetic rate) + all-reduces * time of one + drops * time left

Where an engine fuses the all-reduce with the residual addition and the norm behind it into one kernel, that kernel's
time counts as the all-reduce's, and a dropped one leaves the addition and the norm to do ("time left"); elsewhere
nothing is left. Where branches go through a norm, the partial sums of a dropped sync point make another's message twice
as wide, and what that takes is left. Bytes are a rank's weights and its KV cache; a plan's predictors and replicated
heads add theirs to all but the dense step. Nothing is taken to overlap, and no rate is reached in full: both are
multiplied by ATTAINED (machine_latency.py). The embedding's all-reduce, the gathering of the logits, launches and the
scheduler are not in it: a real step is longer, and the share saved smaller. Where a machine was measured (`spd-calib
bench`) its own dense step stands in for the first term.
"""

from dataclasses import dataclass
from typing import Literal

from spd_calib.errors import SpdError
from spd_calib.formats.plan import Latency

Phase = Literal["decode", "prefill"]
PHASES: tuple[Phase, Phase] = ("decode", "prefill")


@dataclass(frozen=True)
class Step:
    """One forward: `batch` sequences of `context` tokens, all of them new (prefill) or one more each (decode)."""

    phase: Phase
    batch: int
    context: int
    itemsize: int  # bytes of a weight, a cached value, a hidden value

    @property
    def new_tokens(self) -> int:
        return self.batch * (self.context if self.phase == "prefill" else 1)


@dataclass(frozen=True)
class LatencyModel:
    """Seconds of a step outside its all-reduces, of one all-reduce, of what is left of it where it is dropped, and of
    what a plan's predictors and replicated heads add to a step."""

    hardware: str
    step: Step
    blocks: int
    compute: float
    all_reduce: float
    left: float = 0.0
    added: float = 0.0

    @property
    def saved_by_one(self) -> float:
        """Return the seconds that one dropped sync point saves."""
        return self.all_reduce - self.left

    def seconds(self, dropped: int) -> float:
        """Return the seconds of a step without `dropped` of its 2 L all-reduces."""
        added = self.added if dropped else 0.0
        kept = 2 * self.blocks - dropped
        return self.compute + kept * self.all_reduce + dropped * self.left + added

    def saved(self, dropped: int) -> float:
        """Return the share saved of the dense step; below 0 where what is added costs more than the all-reduces did."""
        return (dropped * self.saved_by_one - (self.added if dropped else 0.0)) / self.seconds(0)

    @property
    def ceiling(self) -> float:
        """Return the share that dropping every droppable sync point would save: all but the last MLP's, none added."""
        return (2 * self.blocks - 1) * self.saved_by_one / self.seconds(0)

    def drops_for(self, saving: float, *, available: int) -> int:
        """Return the fewest drops that save this share: all save the same, which ones is a matter of KL.

        Raises SpdError, naming the ceiling, where all `available` do not.
        """
        for n in range(available + 1):
            if self.saved(n) >= saving * (1 - 1e-9):
                return n
        raise SpdError(
            f"`min_speedup` {100 * saving:.3g}% is beyond what can be saved here: dropping all {available} sync points "
            f"profiled saves {100 * self.saved(available):.3g} %, all {2 * self.blocks - 1} there are "
            f"{100 * self.ceiling:.3g} % ({self.step.phase}, batch {self.step.batch}, context {self.step.context}, "
            f"{self.hardware}); ask for less."
        )

    def latency(self, dropped: int) -> Latency:
        """Return what stands in a plan that drops so many sync points."""
        return Latency(
            hardware=self.hardware,
            phase=self.step.phase,
            batch=self.step.batch,
            context=self.step.context,
            all_reduce_seconds=self.all_reduce,
            left_seconds=self.left,
            dense_seconds=self.seconds(0),
            planned_seconds=self.seconds(dropped),
            saved=self.saved(dropped),
            ceiling=self.ceiling,
        )
