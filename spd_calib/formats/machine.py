"""machine.json: what a machine's memory, arithmetic and all-reduces are capable of; the latency model reads it."""

from typing import Literal, Self

from pydantic import Field, model_validator

from .common import Finite, Part


class AllReduce(Part):
    bytes: int = Field(gt=0, description="Of the tensor that is summed")
    seconds: Finite = Field(gt=0)


class FusedNorm(Part):
    """An engine's kernel that reduces, adds to the residual stream and normalises at once, for small messages.

    Where a sync point is dropped, the addition and the norm are left, and run as a kernel of their own.
    """

    max_bytes: int = Field(gt=0, description="The largest message that goes by it")
    left_seconds: Finite = Field(gt=0, description="What is left of its time where the sync point is dropped")
    source: str = Field(min_length=1, description="Where the figures are from")


class Machine(Part):
    """One rank's share of it. The tables that are shipped lie in `spd_calib/planning/machines/`."""

    format: Literal["spd-calib/machine"] = "spd-calib/machine"
    version: Literal[1] = 1
    name: str = Field(min_length=1)
    source: str = Field(min_length=1, description="Where the figures are from")
    ranks: int = Field(gt=1, description="Ranks the all-reduces were timed with")
    memory_bytes_per_second: Finite = Field(gt=0, description="Of one rank's memory")
    flops_per_second: Finite = Field(gt=0, description="Of one rank, in the dtype served")
    all_reduces: list[AllReduce] = Field(min_length=1, description="By size, smallest first")
    fused_norm: FusedNorm | None = Field(
        default=None, description="Where the engine fuses them; the times above are then the fused kernel's"
    )

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        sizes = [r.bytes for r in self.all_reduces]
        if sizes != sorted(set(sizes)):
            raise ValueError("the all-reduces are not by size, each once, smallest first")
        return self
