"""The drops of both phases of a request: prefill reads the prompt, decoding gives one token after the other."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from .drops import NOTHING_DROPPED, Drops

Phase = Literal["decode", "prefill"]
PHASES: tuple[Phase, Phase] = ("decode", "prefill")


def phase_of(new_tokens: int) -> Phase:
    """Return the phase of a forward with so many new tokens of each sequence."""
    return "prefill" if new_tokens > 1 else "decode"


@dataclass(frozen=True)
class ByPhase:
    """The drops of prefill and those of decoding, which may be the same.

    A forward with more than one new token a sequence is prefill (`phase_of`). The phases share a cache, and need to
    agree on nothing but its shape (docs/design.md, section 2): what prefill left there is read by decoding as it is.
    """

    prefill: Drops
    decode: Drops

    def __post_init__(self) -> None:
        if self.prefill.replicated != self.decode.replicated:
            raise ValueError("heads that one phase replicates must be in the cache of the other: replicate in both")

    @classmethod
    def of(cls, drops: "Drops | ByPhase") -> "ByPhase":
        """Return what is given; of drops alone, the same in both phases."""
        return drops if isinstance(drops, ByPhase) else cls(drops, drops)

    @property
    def one_choice(self) -> bool:
        """Say whether both phases drop the same."""
        return self.prefill == self.decode

    def at(self, phase: Phase) -> Drops:
        """Return the drops of one phase."""
        return self.prefill if phase == "prefill" else self.decode

    def of_forward(self, new_tokens: int) -> Drops:
        """Return the drops of a forward that has so many new tokens of each sequence."""
        return self.at(phase_of(new_tokens))

    def map(self, change: Callable[[Drops], Drops]) -> "ByPhase":
        """Return the drops of both phases with this change, which is made once where they are the same object."""
        prefill = change(self.prefill)
        return ByPhase(prefill, prefill if self.decode is self.prefill else change(self.decode))


NOTHING_DROPPED_IN_BOTH = ByPhase.of(NOTHING_DROPPED)
