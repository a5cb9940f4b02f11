"""Callbacks by which a long call tells how far it is: commands show it at the terminal, a notebook may ignore it."""

from collections.abc import Callable
from dataclasses import dataclass


def _ignore(*_: object) -> None:
    pass


@dataclass(frozen=True)
class Progress:
    """Callbacks, each of which may be left out.

    `say` is given a sentence worth reading; `expect` a number of steps that are to come, as soon as they are known of;
    `step` is called after each, with a note on what was just done.
    """

    say: Callable[[str], None] = _ignore
    expect: Callable[[int], None] = _ignore
    step: Callable[[str], None] = _ignore

    def measured(self, *_: object) -> None:
        """Count a step: a plan was measured on one more batch."""
        self.step("")


SILENT = Progress()
