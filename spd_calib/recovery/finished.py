"""The steps of a recovery that are finished: kept as they are done, and taken over by the run that goes on."""

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar
from weakref import WeakKeyDictionary

from torch import Tensor

from spd_calib.errors import InputError
from spd_calib.formats.recovery import Attempt
from spd_calib.parallel.comm import Comm
from spd_calib.parallel.distributed import from_main_rank

from .distillation import TrainingHooks
from .journal import TensorJournal
from .judge import Judge
from .planned_model import PlannedModel
from .student import Student

T = TypeVar("T")
Saved = tuple[dict[str, Tensor], dict]  # tensors, and a note


@dataclass(frozen=True)
class FinishedSteps:
    """The steps of a recovery that a journal holds; without one (None) nothing is kept, and nothing taken over.

    Of several replicas the main one reads and writes it, and tells the others.
    """

    model: PlannedModel
    judge: Judge
    journal: TensorJournal | None
    replicas: Comm
    # under which name of the journal a student's state lies
    _written: MutableMapping[Student, str] = field(default_factory=WeakKeyDictionary)

    @property
    def is_main(self) -> bool:
        """Say whether this is the main replica."""
        return self.replicas.ranks[0] == 0

    def agreed(self, of_main: Callable[[], T]) -> T | None:
        """Return, on every replica, what the main one finds; all of them call this at once."""
        return from_main_rank(of_main() if self.is_main else None)

    def saved(self, name: str) -> Saved | None:
        """Return what stands under `name`, if anything does."""
        return None if self.journal is None else self.journal.load(name)

    def take_over(self, name: str, *, measured: bool = True, everywhere: bool = False) -> bool:
        """Give the model what an interrupted run had made of its blocks in a step; say whether it had.

        `measured`: the step was judged by the whole. `everywhere`: all replicas call this, else the main one alone.
        """

        def read(name: str) -> Saved | None:
            return self.agreed(lambda: self.saved(name)) if everywhere else self.saved(name)

        step = read(name)
        if step is None:
            return False
        try:
            for block, place in step[1]["blocks"].items():
                self.put_state(int(block), self._state(place, read(place)))
                self._lies_under(place, int(block))
            attempts = [Attempt(**a) for a in step[1]["attempts"]]
        except (KeyError, TypeError, ValueError):  # names, shapes: another's, or damaged
            assert self.journal is not None
            raise InputError(
                f"{self.journal.folder} holds a state of {name} that does not fit; remove the folder, and begin again."
            ) from None
        self.judge.go_on_from(attempts, measured=measured)
        return True

    def has_trained(self, name: str) -> bool:
        """Take over a training that an interrupted run had finished, and say whether it had; all replicas call this.

        Where it had not, the whole is measured as it is before the training, which will be judged against that.
        """
        if self.take_over(name, everywhere=True):
            return True
        if self.is_main:
            _ = self.judge.tally
        return False

    def keep(self, name: str, blocks: Sequence[int]) -> None:
        """Write down that a step is finished, with what it made of `blocks`: what is written already, not again."""
        if self.is_main and self.journal is not None:
            for block in blocks:
                student = self.model.students[block]
                if student not in self._written:
                    self.journal.save(f"{name}.{block}", student.state(), note={})
                    self._lies_under(f"{name}.{block}", block)
            written = {block: self._written[self.model.students[block]] for block in blocks}
            attempts = [a.model_dump() for a in self.judge.attempts]
            self.journal.save(name, {}, note={"attempts": attempts, "blocks": written})
            self.journal.forget(f"training-{name}")  # four times what it trained

    def _lies_under(self, name: str, block: int) -> None:
        """Note that the state of a block's student lies in the journal; of a model read from disk it is read there."""
        student = self.model.students[block]
        self._written[student] = name
        self.model.park(student, lambda: self._state(name, self.saved(name)))

    def _state(self, name: str, saved: Saved | None) -> dict[str, Tensor]:
        """Return a block's state, as it was read. Raises InputError where it is no longer there."""
        if saved is None:
            assert self.journal is not None
            raise InputError(f"{self.journal.folder} held {name}.safetensors; remove the folder, and begin again.")
        return saved[0]

    def choice(self, name: str, choose: Callable[[], list[Attempt]]) -> list[Attempt]:
        """Return what `choose` finds, on every replica; a run that goes on has the choice of the one before."""

        def of_main() -> list[Attempt]:
            if (saved := self.saved(name)) is not None:
                return [Attempt(**a) for a in saved[1]["attempts"]]
            found = choose()
            if self.journal is not None:
                self.journal.save(name, {}, note={"attempts": [a.model_dump() for a in found]})
            return found

        return self.agreed(of_main) or []

    def share(self, blocks: Sequence[int]) -> None:
        """Give all replicas what the main one made of `blocks`."""
        for block in blocks if self.replicas.size > 1 else ():
            state = self.agreed(self.model.students[block].state)
            if not self.is_main and state is not None:
                self.put_state(block, state)

    def put_state(self, block: int, state: dict[str, Tensor]) -> None:
        self.model.put(self.model.students[block].with_state(state))

    def training(self, name: str, what: str) -> TrainingHooks:
        """Return the hooks of the training that is step `name`; `what` it is, in the notes.

        Its state, too, is kept, by the main replica for all.
        """
        name = f"training-{name}"
        saved = self.agreed(lambda: self.saved(name))

        def save(state: dict[str, Tensor]) -> None:
            if self.journal is not None:
                self.journal.save(name, state, note={})

        return TrainingHooks(
            saved=saved and saved[0],
            save=save if self.is_main and self.journal is not None else None,
            tick=lambda note: self.judge.tick(f"distilling {what}, {note}"),
        )
