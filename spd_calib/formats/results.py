"""results.json: the planned model against the dense one on lm-eval tasks."""

from typing import Literal

from pydantic import Field

from .common import Finite, ModelRef, Part, Provenance, Sha256, TensorParallel


class TaskResult(Part):
    task: str
    metric: str
    higher_is_better: bool
    dense: Finite
    planned: Finite
    difference: Finite = Field(description="planned - dense")
    difference_stderr: Finite | None = Field(
        description="Paired, over documents; None where the metric has no value a document"
    )
    documents: int = Field(gt=0)


class Results(Part):
    format: Literal["spd-calib/results"] = "spd-calib/results"
    version: Literal[1] = 1
    model: ModelRef
    tensor_parallel: TensorParallel
    plan_sha256: Sha256
    dropped: list[int]
    limit: int | None
    tasks: list[TaskResult] = Field(min_length=1)
    provenance: Provenance
