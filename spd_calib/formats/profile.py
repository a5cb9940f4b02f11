"""profile.json: what dropping sync points costs, one experiment a row."""

from collections.abc import Sequence
from typing import Literal, Self

from pydantic import Field, model_validator

from .common import Count, Finite, ModelRef, Part, Provenance, Strategy, TensorParallel, TextRef

Metric = Literal["kl", "ppl", "accuracy"]


class Baseline(Part):
    """The dense model on the calibration text."""

    nll: Finite = Field(ge=0, description="Mean negative log-likelihood, nats per token")
    ppl: Finite = Field(ge=1)
    top1_accuracy: Finite = Field(ge=0, le=1)
    tokens: int = Field(gt=0, description="Predicted tokens")
    task_accuracy: dict[str, Finite] = Field(default_factory=dict, description="lm-eval accuracy, task by task")


class Comparison(Part):
    """A planned model against the dense one on the same tokens: means over tokens, errors over sequences."""

    kl: Finite = Field(description="KL(dense || planned), nats per token")
    kl_stderr: Finite = Field(ge=0)
    nll_increase: Finite = Field(description="nats per token")
    nll_increase_stderr: Finite = Field(ge=0)
    ppl: Finite = Field(ge=1, description="Perplexity of the planned model")
    ppl_increase: Finite = Field(description="Relative: planned perplexity / dense perplexity - 1")
    accuracy_drop: Finite = Field(description="Next-token top-1 accuracy lost, as a fraction of all tokens")
    accuracy_drop_stderr: Finite = Field(ge=0)
    top1_agreement: Finite = Field(ge=0, le=1)
    top1_agreement_stderr: Finite = Field(ge=0)
    max_abs_logprob_diff: Finite = Field(ge=0)
    tokens: int = Field(gt=0)
    sequences: int = Field(gt=0)


class Measurement(Comparison):
    """One drop experiment. `dropped` names all blocks dropped in it; `block` is the one it is about."""

    block: Count
    sync_point: Literal["attention", "mlp"] = "attention"
    strategy: Strategy
    dropped: list[Count] = Field(min_length=1)
    task_accuracy_drop: dict[str, Finite] = Field(default_factory=dict)


class Profile(Part):
    format: Literal["spd-calib/profile"] = "spd-calib/profile"
    version: Literal[1] = 1
    model: ModelRef
    tensor_parallel: TensorParallel
    method: Literal["single", "cumulative"]
    rank_by: Metric
    text: TextRef
    verify_text: TextRef = Field(description="Sequences of the same source kept for verifying plans")
    baseline: Baseline
    measurements: list[Measurement] = Field(min_length=1)
    provenance: Provenance

    @model_validator(mode="after")
    def _blocks_exist(self) -> Self:
        for m in self.measurements:
            if max([m.block, *m.dropped]) >= self.model.num_blocks or m.block not in m.dropped:
                raise ValueError(f"a measurement speaks of block {m.block}, dropped {m.dropped}")
            if m.strategy == Strategy.KEEP_SYNC:
                raise ValueError(f"the measurement of block {m.block} drops nothing")
        return self

    @property
    def strategies(self) -> list[Strategy]:
        """The strategies measured, in the order they stand in the file."""
        return list(dict.fromkeys(m.strategy for m in self.measurements))

    def of(self, strategy: Strategy) -> dict[int, Measurement]:
        """Measurements of the attention sync point under one strategy, by block."""
        return {m.block: m for m in self.measurements if m.strategy == strategy and m.sync_point == "attention"}

    def sensitivity(self, strategy: Strategy, metric: Metric | None = None) -> dict[int, float]:
        """What dropping each block costs, by block, in `metric` (default: the one the profile ranks by).

        kl: nats per token; ppl: perplexity points, absolute; accuracy: fraction lost (mean over lm-eval tasks
        where the profile has them). `single` measures it directly; `cumulative` takes the difference of
        consecutive measurements from the last block backwards (the paper, section 4.2).
        """
        rows = self.of(strategy)
        values = {block: self._value(m, metric or self.rank_by) for block, m in rows.items()}
        if self.method == "single":
            return values
        order: Sequence[int] = sorted(values)
        following = dict(zip(order, [*order[1:], None], strict=True))
        return {
            block: values[block] - (values[after] if (after := following[block]) is not None else 0.0)
            for block in order
        }

    def _value(self, m: Measurement, metric: Metric) -> float:
        if metric == "kl":
            return m.kl
        if metric == "ppl":
            return m.ppl - self.baseline.ppl
        if m.task_accuracy_drop:
            return sum(m.task_accuracy_drop.values()) / len(m.task_accuracy_drop)
        return m.accuracy_drop

    def ranking(self, strategy: Strategy, metric: Metric | None = None) -> list[int]:
        """Blocks, least sensitive first; ties (frequent in accuracy) fall to the lower KL."""
        value = self.sensitivity(strategy, metric)
        kl = self.sensitivity(strategy, "kl")
        return sorted(value, key=lambda block: (value[block], kl[block], block))
