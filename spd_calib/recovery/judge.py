"""Never worse: what is done to the model stays only where it is better for it, and everything tried is written down."""

from collections.abc import Callable, Sequence

import torch

from spd_calib.formats.recovery import Attempt
from spd_calib.sensitivity.metrics import Tally

from .held_out import HeldOut
from .planned_model import PlannedModel
from .report import REPLICATED, judged_by_error, judged_by_whole
from .student import Student

ROUNDING = 10.0  # units of the dtype's precision squared, by which an error may fall for no reason


class Judge:
    """Decides which treatments stay, on held-out text, and writes down all `attempts`.

    A treatment that is judged by the whole stays where the KL of the whole plan falls by more than the standard error
    of that fall. `tick` is given a note after each decision.
    """

    def __init__(self, model: PlannedModel, held_out: HeldOut, *, tick: Callable[[str], None]):
        self.model, self.held_out, self.tick = model, held_out, tick
        self.attempts: list[Attempt] = []
        self._tally: Tally | None = None

    @property
    def tally(self) -> Tally:
        """Return what the planned model, with all that stayed, measures."""
        if self._tally is None:
            self._tally = self.held_out.measure()
        return self._tally

    def note(self, block: int, treatment: str, *, before: float, after: float, began: float, detail: dict) -> bool:
        """Write down a treatment judged by the error at its block's output; return whether that fell.

        The error is a share of squares: in a block that misses nothing, that of rounding itself.
        """
        least = ROUNDING * torch.finfo(self.model.lm.model.dtype).eps ** 2
        found = judged_by_error(block, treatment, before, after, least=least, began=began, detail=detail)
        self.attempts.append(found)
        verdict = "kept" if found.kept else "refused"
        self.tick(f"block {block}, {treatment}: error at its output {before:.4f} -> {after:.4f}, {verdict}")
        return found.kept

    def decide(self, block: int | None, treatment: str, *, began: float, detail: dict) -> bool:
        """Return whether a treatment of `block` (None: of all treated blocks), which stands in the model, is to stay.

        `tally` was taken before it was put there: one taken now would compare it with itself. `began` is when it was
        begun, by time.monotonic; `detail` is what the report says of it.
        """
        assert self._tally is not None
        before, after = self._tally, self.held_out.measure()
        found = judged_by_whole(block, treatment, before, after, began=began, detail=detail)
        self.attempts.append(found)
        where = "all treated blocks" if block is None else f"block {block}"
        verdict = "kept" if found.kept else "refused"
        self.tick(f"{where}, {treatment}: KL {before.kl():.4f} -> {after.kl():.4f}, {verdict}")
        if found.kept:
            self._tally = after
        return found.kept

    def undo(self, students: Sequence[Student]) -> None:
        """Give the model these students back, and write down that what was done to their blocks does not stay.

        Heads that were replicated stay where they are.
        """
        blocks = {student.index for student in students}
        for student in students:
            self.model.put(student)
        self.attempts = [
            a.model_copy(update={"kept": False, "detail": {**a.detail, "undone": True}})
            if a.block in blocks and a.kept and a.treatment != REPLICATED
            else a
            for a in self.attempts
        ]

    def replaced(self, students: Sequence[Student], attempts: Sequence[Attempt]) -> None:
        """Give the model these students in place of what was treated, for reasons that `attempts` write down."""
        self.undo(students)
        self.attempts.extend(attempts)
        self._tally = self.held_out.measure()

    def go_on_from(self, attempts: Sequence[Attempt], *, measured: bool) -> None:
        """Take over the attempts of an interrupted run, whose students the model has by now.

        With `measured` the next judgement by the whole starts from what the model has by now.
        """
        self.attempts = list(attempts)
        if measured:
            self._tally = None
