"""A model of how long a step takes with some sync points dropped: what an all-reduce is worth on a machine.

    step = max(bytes moved / memory rate, FLOPs / arithmetic rate) + all-reduces * time of one + drops * time left

Where an engine fuses the all-reduce with the residual addition and the norm behind it into one kernel, that kernel's
time counts as the all-reduce's, and a dropped one leaves the addition and the norm to do ("time left"); elsewhere
nothing is left. Where branches go through a norm, the partial sums of a dropped sync point make another's message twice
as wide, and what that takes is left. A quantised sync takes as long as an all-reduce of the bytes that it sends, and
the packing, so each treatment of a sync point has its own time, in prefill and in decode. Bytes are a rank's weights
and its KV cache; a plan's predictors and replicated heads add theirs to all but the dense step. Nothing is taken to
overlap, and no rate is reached in full: both are multiplied by ATTAINED (machine_latency.py). The embedding's
all-reduce, the gathering of the logits, launches and the scheduler are not in it: a real step is longer, and the share
saved smaller. Where a machine was measured (`spd-calib bench`) its own dense step stands in for the first term.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from spd_calib.errors import SpdError
from spd_calib.formats.drops import Drop, Strategy
from spd_calib.formats.phases import Phase
from spd_calib.formats.plan import Latency

NONE: Mapping[int, int] = MappingProxyType({})  # none of the syncs is quantised


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
class Sync:
    """Holds the seconds that a sync takes where it is kept, and what one before it leaves that is dropped."""

    kept: float
    left: float


@dataclass(frozen=True)
class LatencyModel:
    """Seconds of a step outside its all-reduces, of one all-reduce, of what is left of it where it is dropped, of what
    a plan's predictors and replicated heads add to a step, and of quantised syncs by their bits.

    A plan is told by how many of the 2 L sync points it drops, and how many it keeps with so many bits, by bits.
    """

    hardware: str
    step: Step
    blocks: int
    compute: float
    all_reduce: float
    left: float = 0.0
    added: float = 0.0
    quantised: Mapping[int, Sync] = field(default_factory=dict)

    @property
    def saved_by_one(self) -> float:
        """Return the seconds that one dropped sync point saves."""
        return self.all_reduce - self.left

    def seconds(self, dropped: int, quantised: Mapping[int, int] = NONE) -> float:
        """Return the seconds of a step without `dropped` of its 2 L all-reduces, `quantised` of them by bits."""
        added = self.added if dropped else 0.0
        kept = 2 * self.blocks - dropped
        step = self.compute + kept * self.all_reduce + dropped * self.left + added
        return step - self._saved_by_bits(dropped, quantised)

    def saved(self, dropped: int, quantised: Mapping[int, int] = NONE) -> float:
        """Return the share saved of the dense step; below 0 where what is added costs more than the all-reduces did."""
        by_drops = dropped * self.saved_by_one - (self.added if dropped else 0.0)
        return (by_drops + self._saved_by_bits(dropped, quantised)) / self.seconds(0)

    def _saved_by_bits(self, dropped: int, quantised: Mapping[int, int]) -> float:
        """Return the seconds that fewer bits save, what dropped syncs leave being spread evenly over those kept."""
        kept = 2 * self.blocks - dropped
        each = {bits: self.quantised[bits] for bits in quantised}
        of_kept = (n * (self.all_reduce - each[bits].kept) for bits, n in quantised.items())
        of_left = (n / kept * dropped * (self.left - each[bits].left) for bits, n in quantised.items())
        return sum(of_kept) + sum(of_left)

    def of(self, treatment: Drop) -> float:
        """Return the seconds that a sync point takes that is treated so.

        What a dropped one leaves is sent with the bits of the next sync, which are not known: those that take longest.
        """
        if treatment.strategy != Strategy.KEEP_SYNC:
            return max([self.left, *(sync.left for sync in self.quantised.values())])
        return self.all_reduce if treatment.bits is None else self.quantised[treatment.bits].kept

    @property
    def ceiling(self) -> float:
        """Return the share that dropping every droppable sync point would save: all but the last MLP's, none added."""
        return self.ceiling_with(None)

    def ceiling_with(self, bits: int | None) -> float:
        """Return the same where the one sync that is left, and what waits for it, has so many bits."""
        most = 2 * self.blocks - 1
        saved = most * self.saved_by_one + self._saved_by_bits(most, self.rest(most, bits))
        return saved / self.seconds(0)

    def drops_for(self, saving: float, *, available: int, bits: int | None = None) -> int:
        """Return the fewest drops that save this share: all save the same, which ones is a matter of KL.

        Those kept have `bits`, if given. Raises SpdError, naming the ceiling, where all `available` do not.
        """
        found = [self.saved(n, self.rest(n, bits)) for n in range(available + 1)]
        for n, saved in enumerate(found):
            if saved >= saving * (1 - 1e-9):
                return n
        others = f" with {bits} bits in every other sync" if bits else ""
        raise SpdError(
            f"`min_speedup` {100 * saving:.3g}% is beyond what can be saved here: dropping all {available} sync points "
            f"profiled saves {100 * found[-1]:.3g} %{others}, all {2 * self.blocks - 1} there are "
            f"{100 * self.ceiling_with(bits):.3g} % ({self.step.phase}, batch {self.step.batch}, "
            f"context {self.step.context}, {self.hardware}); ask for less."
        )

    def rest(self, dropped: int, bits: int | None) -> dict[int, int]:
        """Return how many syncs have how many bits where all but those `dropped` have `bits`; None of None."""
        return {} if bits is None else {bits: 2 * self.blocks - dropped}

    def latency(self, dropped: int, quantised: Mapping[int, int] = NONE) -> Latency:
        """Return what stands in a plan that drops so many sync points, and sends so many with fewer bits."""
        return Latency(
            hardware=self.hardware,
            phase=self.step.phase,
            batch=self.step.batch,
            context=self.step.context,
            all_reduce_seconds=self.all_reduce,
            left_seconds=self.left,
            quantised_seconds={bits: self.quantised[bits].kept for bits in sorted(quantised, reverse=True)},
            dense_seconds=self.seconds(0),
            planned_seconds=self.seconds(dropped, quantised),
            saved=self.saved(dropped, quantised),
            ceiling=max(map(self.ceiling_with, [None, *quantised])),
        )
