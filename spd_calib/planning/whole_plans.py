"""Whole plans, measured: on calibration text to choose by, and on rounds of held-out text to verify what was chosen."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from spd_calib.formats.common import TextRef
from spd_calib.formats.drops import Drops
from spd_calib.formats.phases import ByPhase
from spd_calib.formats.profile import Comparison
from spd_calib.sensitivity.averaging import average
from spd_calib.sensitivity.measure import Subject, Tick, measure
from spd_calib.sensitivity.served import measure_served, served_batches

Sequences = Sequence[Sequence[int]]  # token ids of one text
P = TypeVar("P", Drops, ByPhase)  # what is measured as a plan
TaskLoss = Callable[[], tuple[dict[str, float], dict[str, float]]]
"""Returns, by lm-eval task, the accuracy lost by what the model runs at the moment, and its standard error."""


def measure_plans(
    plans: Sequence[Drops],
    texts: Sequence[Sequences],
    *,
    subject: Subject,
    batch_size: int = 8,
    task_loss: TaskLoss | None = None,
    expect: Callable[[int], None] | None = None,
    tick: Tick | None = None,
) -> list[Comparison]:
    """Return what each of `plans` costs as a whole, the mean over `texts`; with `task_loss`, on its tasks, too.

    `expect` is told, before the first, how often `tick` will be called.
    """
    if expect is not None:
        expect(len(plans) * sum(math.ceil(len(sequences) / batch_size) for sequences in texts))
    by_text = [
        measure(subject, sequences, plans=plans, batch_size=batch_size, tick=tick)[1] for sequences in texts
    ]  # fmt: skip
    found = [average(of_one_plan) for of_one_plan in zip(*by_text, strict=True)]
    if task_loss is None:
        return found
    return [_with_tasks(subject, drops, m, task_loss=task_loss) for drops, m in zip(plans, found, strict=True)]


def measure_plans_served(
    plans: Sequence[ByPhase],
    texts: Sequence[Sequences],
    *,
    subject: Subject,
    batch_size: int = 8,
    expect: Callable[[int], None] | None = None,
    tick: Tick | None = None,
) -> list[Comparison]:
    """Return what each of `plans` costs as it is served (sensitivity/served.py), the mean over `texts`.

    `expect` is told, before the first, how often `tick` will be called.
    """
    if expect is not None:
        expect(len(plans) * sum(len(served_batches(sequences, batch_size)) for sequences in texts))
    by_text = [
        measure_served(subject, sequences, plans=plans, batch_size=batch_size, tick=tick) for sequences in texts
    ]  # fmt: skip
    return [average([tally.comparison() for tally in of_one_plan]) for of_one_plan in zip(*by_text, strict=True)]


def _with_tasks(subject: Subject, drops: Drops, measured: Comparison, *, task_loss: TaskLoss) -> Comparison:
    with subject.lm.running(subject.always | drops):
        lost, stderr = task_loss()
    return measured.model_copy(update={"task_accuracy_drop": lost, "task_accuracy_drop_stderr": stderr})


SHARE, FEWEST = 8, 4  # of the sequences, or at least so many, is the part of a text that sets race on


def part_of(text: Sequences) -> Sequences:
    """Return the part of a calibration text that sets race on; that they race on the same makes it a fair one."""
    return text[: max(FEWEST, math.ceil(len(text) / SHARE))]


class Calibration:
    """Whole plans on the calibration text; each is measured once, by `measure_new`, and held in `measured`.

    `race` measures plans on a part of that text (by default on the whole).
    """

    def __init__(
        self,
        measure_new: Callable[[Sequence[Drops]], list[Comparison]],
        *,
        race: Callable[[Sequence[Drops]], list[Comparison]] | None = None,
    ):
        self.measure_new, self.race = measure_new, race or self.measure
        self.measured: dict[Drops, Comparison] = {}
        self._raced: dict[Drops, Comparison] = {}

    def measure(self, plans: Sequence[Drops]) -> list[Comparison]:
        """Return what each of `plans` costs, in their order."""
        if new := [drops for drops in dict.fromkeys(plans) if drops not in self.measured]:
            self.measured.update(zip(new, self.measure_new(new), strict=True))
        return [self.measured[drops] for drops in plans]

    def measure_on_part(self, plans: Sequence[Drops]) -> dict[Drops, Comparison]:
        """Return what each of `plans` costs on a part of the text."""
        if new := [drops for drops in plans if drops not in self._raced]:
            self._raced.update(zip(new, self.race(new), strict=True))
        return {drops: self._raced[drops] for drops in plans}

    def cost_of(self, drops: Drops) -> Comparison:
        """Return what one plan costs."""
        return self.measure([drops])[0]


@dataclass(frozen=True)
class Round:
    """One round of held-out text: token ids to verify on, of each of the profile's texts, and their name in a file."""

    texts: Sequence[Sequences]
    ref: TextRef


class HeldOut(Generic[P]):
    """Held-out text, round after round, on which plans are verified.

    A round that showed a plan to break its budget is used up: it took part in choosing the next one. `rounds` yields
    them as they are needed; where they are at an end, the last is used again. `measure` is measure_plans but for its
    first two arguments. `same_documents`: what it measures on lm-eval tasks comes from the same documents every time.
    """

    def __init__(
        self,
        rounds: Iterable[Round],
        *,
        measure: Callable[[Sequence[P], Sequence[Sequences]], list[Comparison]],
        same_documents: bool = False,
    ):
        self._coming: Iterator[Round] = iter(rounds)
        self._rounds: list[Round] = []
        self._measure: Callable[[Sequence[P], Sequence[Sequences]], list[Comparison]] = measure
        self._same_documents = same_documents

    def verify(self, drops: P, used_up: int) -> Comparison:
        """Return what a plan costs on the round that follows the `used_up` first ones."""
        return self._measure([drops], self.after(used_up)[1].texts)[0]

    def after(self, used_up: int) -> tuple[int, Round]:
        """Return the round that follows the `used_up` first ones, or the last there is, and its number from 0 on."""
        while len(self._rounds) <= used_up and (more := next(self._coming, None)) is not None:
            self._rounds.append(more)
        number = min(used_up, len(self._rounds) - 1)
        return number, self._rounds[number]

    def reused(self, used_up: int) -> bool:
        """Say whether what verifies after `used_up` rounds took part in choosing."""
        return used_up > (0 if self._same_documents else self.after(used_up)[0])
