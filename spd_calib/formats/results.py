"""results.json: the planned model against the dense one on lm-eval tasks."""

from typing import Annotated, Literal

from pydantic import Field, JsonValue, WithJsonSchema

from .common import Count, Finite, ModelRef, Part, Provenance, Sha256, TensorParallel

Arguments = Annotated[dict[str, JsonValue], WithJsonSchema({"type": "object"})]  # values are whatever JSON holds


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
    num_fewshot: Count | None = Field(default=None, description="Few-shot examples shown; None for a group")


class Seeds(Part):
    """What random numbers started from, as lm-eval names them."""

    python: Count
    numpy: Count
    torch: Count
    fewshot: Count


class LmEval(Part):
    """How lm-eval was run, under lm-eval's own names: what, beside the tasks, changes a score."""

    lm_eval_version: str
    num_fewshot: Count | None = Field(description="As asked for; None where each task has its own number")
    apply_chat_template: bool
    fewshot_as_multiturn: bool = Field(description="Few-shot examples as turns of the conversation")
    chat_template_sha256: Sha256 | None = Field(description="Of the tokenizer's template, where it was applied")
    system_instruction: str | None
    gen_kwargs: Arguments = Field(description="Put over each task's own")
    model_args: Arguments = Field(description="Of lm-eval's model hf, such as softmax_dtype")
    metadata: Arguments = Field(description="For tasks that make their documents by it")
    samples: dict[str, list[Count]] | None = Field(description="Documents evaluated, where they were named one by one")
    seeds: Seeds
    batch_size: int | Literal["auto"]


class Results(Part):
    format: Literal["spd-calib/results"] = "spd-calib/results"
    version: Literal[1] = 1
    model: ModelRef
    tensor_parallel: TensorParallel
    plan_sha256: Sha256
    dropped: list[int]
    limit: int | Finite | None = Field(description="Documents a task; below 1 a share of them")
    tasks: list[TaskResult] = Field(min_length=1)
    lm_eval: LmEval | None = Field(default=None, description="None in files of a version that did not say")
    provenance: Provenance
