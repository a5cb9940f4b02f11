"""front.json: the cheapest set of sync points of every size, and the size from which on each further one is dear."""

from typing import Literal

from pydantic import Field

from .common import Count, Finite, ModelRef, Part, Provenance, TensorParallel
from .profile import Point


class FrontPoint(Part):
    drops: Count
    predicted_kl: Finite
    measured_kl: Finite | None = Field(default=None, description="On the calibration text, where a plan measured it")
    dropped: list[Point]
    saved: dict[str, Finite] = Field(
        default_factory=dict, description="Share of a dense step's time by phase, modelled, where --hardware was given"
    )


class Front(Part):
    format: Literal["spd-calib/front"] = "spd-calib/front"
    version: Literal[1] = 1
    model: ModelRef
    tensor_parallel: TensorParallel
    points: list[FrontPoint] = Field(min_length=1)
    knee: Count = Field(description="Number of drops: the point farthest below the line from none to all")
    provenance: Provenance
