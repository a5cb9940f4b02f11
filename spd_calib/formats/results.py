"""results.json: the planned model against the dense one on lm-eval tasks."""

from typing import Annotated, Literal

from pydantic import Field, JsonValue, WithJsonSchema

from .common import Count, Finite, ModelRef, Part, Provenance, Sha256, TensorParallel, left_out_if_empty

Arguments = Annotated[dict[str, JsonValue], WithJsonSchema({"type": "object"})]  # values are whatever JSON holds


class TaskResult(Part):
    task: str = Field(description="lm-eval's task or group")
    metric: str = Field(description="lm-eval's metric, such as acc; with its filter where that is not none")
    higher_is_better: bool
    dense: Finite = Field(description="Score of the dense model")
    planned: Finite = Field(description="Score of the planned model")
    difference: Finite = Field(description="planned - dense")
    difference_stderr: Finite | None = Field(
        description="Paired, over documents; null where the metric has no value for each document"
    )
    documents: int = Field(gt=0)
    num_fewshot: Count | None = Field(default=None, description="Few-shot examples shown; null of a group")


class Seeds(Part):
    """The seeds of random numbers, as lm-eval names them."""

    python: Count
    numpy: Count
    torch: Count
    fewshot: Count


class LmEval(Part):
    """The options that lm-eval was run with, under its own names: all that, beside the tasks, changes a score."""

    lm_eval_version: str
    num_fewshot: Count | None = Field(description="As asked for; null where each task has its own number")
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
    plan_sha256: Sha256 = Field(description="Of the plan's file")
    dropped: list[int] = Field(description="Blocks whose attention's sync point is dropped")
    mlp_dropped: list[int] = left_out_if_empty("Blocks whose MLP's sync point is dropped")
    limit: int | Finite | None = Field(description="Documents a task; below 1 a share of them")
    tasks: list[TaskResult] = Field(min_length=1)
    lm_eval: LmEval | None = Field(default=None, description="null in files of a version that did not say")
    provenance: Provenance
