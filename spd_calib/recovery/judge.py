"""Never worse: a treatment stays only where the whole plan is better for it."""

import time
from collections.abc import Callable, Sequence

from .held_out import HeldOut, kl_fall
from .planned_model import PlannedModel
from .report import Attempt
from .student import Student


class Judge:
    """Decides which treatments stay, on held-out text, and writes down all `attempts`.

    A treatment stays where the KL of the whole plan falls by more than the standard error of that fall. `tally` is what
    the planned model, with all that stayed, measures. `tick` is given a note after each decision.
    """

    def __init__(self, model: PlannedModel, held_out: HeldOut, *, tick: Callable[[str], None]):
        self.model, self.held_out, self.tick = model, held_out, tick
        self.attempts: list[Attempt] = []
        self.tally = held_out.measure()

    def try_out(self, student: Student, treatment: str, *, began: float, detail: dict) -> bool:
        """Put a treated student into the planned model; return whether it stays there. See `decide`."""
        before = self.model.put(student)
        stays = self.decide(student.index, treatment, began=began, detail=detail)
        if not stays:
            self.model.put(before)
        return stays

    def decide(self, block: int | None, treatment: str, *, began: float, detail: dict) -> bool:
        """Return whether a treatment of `block` (None: of all treated blocks), which stands in the model, is to stay.

        `began` is when it was begun, by time.monotonic; `detail` is what the report says of it.
        """
        tally = self.held_out.measure()
        fell, error = kl_fall(self.tally, tally)
        stays = fell > error
        seconds = time.monotonic() - began
        self.attempts.append(
            Attempt(block, treatment, self.tally.kl(), tally.kl(), fell, error, stays, seconds, detail)
        )
        where, verdict = "all treated blocks" if block is None else f"block {block}", "kept" if stays else "refused"
        self.tick(f"{where}, {treatment}: KL {self.tally.kl():.4f} -> {tally.kl():.4f}, {verdict}")
        if stays:
            self.tally = tally
        return stays

    def go_on_from(self, attempts: Sequence[Attempt]) -> None:
        """Take over the attempts of an interrupted run, whose students the model has by now."""
        self.attempts, self.tally = list(attempts), self.held_out.measure()
