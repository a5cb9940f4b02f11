"""Which blocks are to be treated how, and what was tried on them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

from spd_calib.errors import InputError

Tier = Literal["insensitive", "sensitive", "extremely sensitive"]


@dataclass
class Attempt:
    """One treatment tried. `block` is None where all treated blocks were trained together."""

    block: int | None
    treatment: str
    kl_before: float
    kl_after: float
    fell: float
    fell_stderr: float
    kept: bool
    seconds: float
    detail: dict = field(default_factory=dict)


@dataclass
class Report:
    """What was tried and what came of it; `json()` for a file."""

    tiers: dict[int, Tier]
    kl_as_is: float
    kl: float = 0.0
    attempts: list[Attempt] = field(default_factory=list)

    def kept(self, block: int) -> list[str]:
        """Treatments of a block that stayed."""
        return [a.treatment for a in self.attempts if a.kept and a.block in (block, None)]

    def json(self) -> dict:
        return {**asdict(self), "tiers": {str(b): t for b, t in self.tiers.items()}}


def tiers(kl: Mapping[int, float], tau1: float | None = None, tau2: float | None = None) -> dict[int, Tier]:
    """Each block's tier by its single KL; by default the thresholds are a quarter of the blocks' mean, and the mean."""
    low, high = thresholds(kl, tau1, tau2)
    return {
        b: "insensitive" if value <= low else "sensitive" if value <= high else "extremely sensitive"
        for b, value in kl.items()
    }


def thresholds(kl: Mapping[int, float], tau1: float | None, tau2: float | None) -> tuple[float, float]:
    mean = sum(kl.values()) / max(len(kl), 1)
    low = mean / 4 if tau1 is None else tau1
    high = max(mean, low) if tau2 is None else tau2
    if not 0 <= low <= high:
        raise InputError(f"The thresholds {low} and {high} are not in order; the first is at most the second, from 0.")
    return low, high
