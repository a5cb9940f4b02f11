"""pareto.json: the cheapest set of sync points of every size, and the size from which on each further one is dear."""

from typing import Literal

from pydantic import Field

from .common import Count, Finite, ModelRef, Part, Provenance, TensorParallel
from .drops import Point


class ParetoPoint(Part):
    drops: Count = Field(description="Number of sync points dropped")
    predicted_kl: Finite = Field(description="By the profile, nats per token")
    measured_kl: Finite | None = Field(default=None, description="On the calibration text, where a plan measured it")
    dropped: list[Point]
    saved: dict[str, Finite] = Field(
        default_factory=dict,
        description="Share of a dense step's time by phase, by the latency model, where hardware was given",
    )


class Pareto(Part):
    format: Literal["spd-calib/pareto"] = "spd-calib/pareto"
    version: Literal[1] = 1
    model: ModelRef
    tensor_parallel: TensorParallel
    points: list[ParetoPoint] = Field(min_length=1)
    knee: Count = Field(description="Number of drops: the point farthest below the line from none to all")
    provenance: Provenance
