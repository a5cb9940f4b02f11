"""Which blocks are to be treated how, and what was tried on them."""

from dataclasses import asdict, dataclass, field

from spd_calib.sensitivity.tiers import Tier


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
