"""profile.json: what dropping sync points costs, one experiment a row."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from spd_calib.errors import InputError

from .common import Count, Finite, ModelRef, Part, Provenance, Sha256, TensorParallel, TextRef, left_out_if_empty
from .drops import Point, Strategy, Sublayer

Metric = Literal["kl", "ppl", "accuracy"]
Cost = Metric | Literal["top1_accuracy"]  # of next tokens; `accuracy` is that of lm-eval tasks where there are any
Stderr = Annotated[Finite | None, Field(ge=0, description="Standard error over sequences; null of one sequence")]


class Baseline(Part):
    """The dense model on the calibration text, as means over tokens."""

    nll: Finite = Field(ge=0, description="Mean negative log-likelihood, nats per token")
    ppl: Finite = Field(ge=1, description="Perplexity")
    top1_accuracy: Finite = Field(ge=0, le=1, description="Share of tokens that are the likeliest")
    tokens: int = Field(gt=0, description="Predicted tokens")
    task_accuracy: dict[str, Finite] = Field(default_factory=dict, description="lm-eval accuracy, task by task")
    per_text: list["Baseline"] = left_out_if_empty("Of several texts: each; the rest is then their mean")


class Comparison(Part):
    """A planned model against the dense one on the same tokens: means over tokens, errors over sequences."""

    kl: Finite = Field(description="KL(dense || planned), nats per token")
    kl_stderr: Stderr
    nll_increase: Finite = Field(description="nats per token")
    nll_increase_stderr: Stderr
    ppl: Finite = Field(ge=1, description="Perplexity of the planned model")
    ppl_increase: Finite = Field(description="Relative: planned perplexity / dense perplexity - 1")
    accuracy_drop: Finite = Field(description="Next-token top-1 accuracy lost, as a fraction of all tokens")
    accuracy_drop_stderr: Stderr
    top1_agreement: Finite = Field(ge=0, le=1, description="Share of tokens at which both find the same one likeliest")
    top1_agreement_stderr: Stderr
    max_abs_logprob_diff: Finite = Field(
        ge=0, description="Largest |delta log p|, of any token of the vocabulary, nats"
    )
    routed_as_dense: Finite | None = Field(
        default=None,
        ge=0,
        le=1,
        exclude_if=lambda value: value is None,
        description="Of a model with mixtures of experts: share of tokens and blocks whose experts are those that the "
        "dense model chooses",
    )
    task_accuracy_drop: dict[str, Finite] = Field(
        default_factory=dict, description="Accuracy lost on lm-eval tasks, where they were run"
    )
    task_accuracy_drop_stderr: dict[str, Finite] = Field(
        default_factory=dict, description="Paired, over documents; where a budget was of these tasks"
    )
    tokens: int = Field(gt=0, description="Predicted tokens")
    sequences: int = Field(gt=0)
    per_text: list["Comparison"] = left_out_if_empty(
        "Of several texts: each; the rest is then their mean, `max_abs_logprob_diff` the largest"
    )


class Measurement(Comparison):
    """One drop experiment about the sync point of `block`; `dropped` names all blocks dropped in it."""

    block: Count
    sync_point: Sublayer = Field(default="attention", description="Behind the block's attention or its MLP")
    strategy: Strategy
    dropped: list[Count] = Field(min_length=1, description="Blocks whose sync point of this kind is dropped")
    stopped_early: bool = Field(
        default=False, description="Its tier (by KL) was certain before the end of the text, so the rest was not run"
    )


class MeasuredPoint(Part):
    """A sync point that was really dropped on some of the sequences, beside its uncorrected prediction."""

    point: Point
    kl: Finite = Field(description="On those sequences, nats per token")
    kl_stderr: Stderr
    sequences: int = Field(gt=0)
    second_order: Finite = Field(description="KL as predicted to second order on all sequences, before the correction")


class Fisher(Part):
    """Predicts the KL of block-dropping any set of sync points: to second order (sensitivity/fisher.py), corrected by
    what was measured where some of them were really dropped (sensitivity/correction.py).

    A term is one sync point, or two consecutive ones for what they change beyond their sum; it counts where all its
    sync points are dropped. The KL, nats per token, is the sum of the matrix entries over all ordered pairs of terms
    that count.
    """

    terms: list[list[Point]] = Field(
        min_length=1, description="One sync point each, or two consecutive ones for what they change beyond their sum"
    )
    matrix: list[list[Finite]] = Field(
        description="Symmetric, KL in nats per token by pair of terms; row i holds the columns from i on"
    )
    stderr: list[list[Finite]] | None = Field(
        description="Standard error of each entry of `matrix`, over sequences; for single sync points it "
        "includes the error of the correction; null of one sequence"
    )
    samples: int = Field(gt=0, description="Random scores drawn for each sequence")
    sampling_error: Finite = Field(ge=0, description="Relative standard error of a KL due to the scores alone")
    measured: list[MeasuredPoint] = left_out_if_empty("The measurements that the predictions were corrected by")
    per_text: list["Fisher"] = left_out_if_empty(
        "Of several texts: each; the rest is then their mean, `samples` the fewest, `sampling_error` the largest"
    )

    @model_validator(mode="after")
    def _triangular(self) -> Self:
        n = len(self.terms)
        triangles = [self.matrix, *([self.stderr] if self.stderr is not None else [])]
        if any([len(row) for row in rows] != list(range(n, 0, -1)) for rows in triangles):
            raise ValueError(f"the upper triangle of {n} terms was expected")
        if any(not 1 <= len(term) <= 2 for term in self.terms):
            raise ValueError("a term is of one or two sync points")
        return self

    def of(self, point: Point) -> tuple[float, float | None]:
        """Return the KL of dropping one sync point alone, nats per token, and its standard error."""
        i = self.terms.index([point])
        return self.matrix[i][0], None if self.stderr is None else self.stderr[i][0]


class Recovered(Part):
    """The origin of a checkpoint that `recover` wrote: the model it was made from, and what its own plan drops.

    Those sync points are dropped in every measurement, each of which drops one more and is compared with the model
    that the checkpoint was made from.
    """

    recovered_from: ModelRef = Field(description="The dense model that everything is compared with")
    plan_sha256: Sha256 = Field(description="Of plan.json in the checkpoint")
    settled: list[Point] = Field(min_length=1, description="The sync points that the checkpoint's own plan drops")
    alone: Comparison = Field(description="What the checkpoint costs with those dropped and no other")


class Profile(Part):
    format: Literal["spd-calib/profile"] = "spd-calib/profile"
    version: Literal[1] = 1
    model: ModelRef
    tensor_parallel: TensorParallel
    method: Literal["single", "cumulative", "fisher"] = Field(
        description="single: each sync point dropped alone; cumulative: the paper's, from the last block backwards; "
        "fisher: predicted, in `fisher`"
    )
    rank_by: Metric = Field(description="What blocks are ranked by")
    text: TextRef = Field(description="Sequences that were measured on")
    verify_text: TextRef = Field(description="Sequences of the same source kept for verifying plans")
    baseline: Baseline
    measurements: list[Measurement] = Field(description="Empty where the method is fisher")
    estimated: list[Point] = left_out_if_empty(
        "Sync points with a norm behind them: where one was dropped, ranks read a scale times what that norm makes of "
        "their own partial sum, plus a mean, fitted on the text to measure on"
    )
    fisher: Fisher | None = None
    recovered: Recovered | None = None
    provenance: Provenance

    @model_validator(mode="after")
    def _blocks_exist(self) -> Self:
        if (self.method == "fisher") != (self.fisher is not None) or bool(self.fisher) == bool(self.measurements):
            raise ValueError("a profile holds either measurements or, with the method fisher, what it predicts")
        if self.recovered and self.method != "single":
            raise ValueError("a recovered checkpoint is profiled by single measurements")
        last = self.model.num_blocks - 1
        points = [Point(block=m.block, sync_point=m.sync_point) for m in self.measurements]
        points += [p for term in self.fisher.terms for p in term] if self.fisher else []
        points += self.settled
        for p in points:
            if p.block > last or (p.block == last and p.sync_point == "mlp"):
                raise ValueError(f"the {p.sync_point} sync point of block {p.block} is none that can be dropped")
        for m in self.measurements:
            if max([m.block, *m.dropped]) >= self.model.num_blocks or m.block not in m.dropped:
                raise ValueError(f"a measurement speaks of block {m.block}, dropped {m.dropped}")
            if m.strategy == Strategy.KEEP_SYNC:
                raise ValueError(f"the measurement of block {m.block} drops nothing")
        predicted = [len(self.fisher.per_text)] if self.fisher else []
        for found in (len(self.baseline.per_text), *predicted, *(len(m.per_text) for m in self.measurements)):
            if found != len(self.text.parts):
                raise ValueError(f"{found} texts' own results were found, of {len(self.text.parts)} texts")
        if len(self.verify_text.parts) != len(self.text.parts):
            raise ValueError("the texts to measure on and to verify on are not the same number")
        return self

    @property
    def strategies(self) -> list[Strategy]:
        """Return the strategies measured, in the order in which they stand in the file."""
        return [Strategy.BLOCK_DROP] if self.fisher else list(dict.fromkeys(m.strategy for m in self.measurements))

    @property
    def sync_points(self) -> list[Sublayer]:
        """Return the kinds of sync points that were profiled."""
        if self.fisher:
            return list(dict.fromkeys(term[0].sync_point for term in self.fisher.terms if len(term) == 1))
        return list(dict.fromkeys(m.sync_point for m in self.measurements))

    @property
    def settled(self) -> list[Point]:
        """Return the sync points that every plan drops: those of a recovered checkpoint's own plan, else none."""
        return self.recovered.settled if self.recovered else []

    def of(self, strategy: Strategy, sync_point: Sublayer = "attention") -> dict[int, Measurement]:
        """Return the measurements of one kind of sync point under one strategy, by block."""
        return {m.block: m for m in self.measurements if m.strategy == strategy and m.sync_point == sync_point}

    def kl(self, strategy: Strategy, sync_point: Sublayer = "attention") -> dict[int, tuple[float, float | None]]:
        """Return the KL of dropping each block's sync point, and its standard error, by block.

        None where the KL is the difference of two measurements, whose standard error is not held: of a cumulative
        profile and of a recovered checkpoint.
        """
        if self.fisher is None:
            value, direct = self.sensitivity(strategy, "kl", sync_point), self.method == "single" and not self.recovered
            rows = self.of(strategy, sync_point)
            return {block: (value[block], m.kl_stderr if direct else None) for block, m in rows.items()}
        points = [term[0] for term in self.fisher.terms if len(term) == 1 and strategy == Strategy.BLOCK_DROP]
        return {p.block: self.fisher.of(p) for p in points if p.sync_point == sync_point}

    def sensitivity(
        self, strategy: Strategy, metric: Cost | None = None, sync_point: Sublayer = "attention"
    ) -> dict[int, float]:
        """Return what dropping each block's sync point costs, in `metric` (default: the one the profile ranks by).

        kl: nats per token; ppl: perplexity points, absolute; accuracy: fraction lost (mean over lm-eval tasks
        where the profile has them); top1_accuracy: fraction of next tokens lost. `single` measures it directly;
        `cumulative` takes the difference of consecutive measurements from the last block backwards (the paper,
        section 4.2); `fisher` predicts KL alone: InputError is raised for any other metric. For a recovered
        checkpoint it is what the drop adds to what the checkpoint costs already.
        """
        if self.fisher is not None:
            if (metric or self.rank_by) != "kl":
                raise InputError("A profile by the method fisher knows KL alone; profile with method single for this.")
            return {block: kl for block, (kl, _) in self.kl(strategy, sync_point).items()}
        rows = self.of(strategy, sync_point)
        values = {block: self._value(m, metric or self.rank_by) for block, m in rows.items()}
        if self.recovered:
            alone = self._value(self.recovered.alone, metric or self.rank_by)
            return {block: value - alone for block, value in values.items()}
        if self.method == "single":
            return values
        order = sorted(values)
        behind = dict(zip(order, [*[values[block] for block in order[1:]], 0.0], strict=False))
        return {block: values[block] - behind[block] for block in order}

    def _value(self, m: Comparison, metric: Cost) -> float:
        if metric == "kl":
            return m.kl
        if metric == "ppl":
            return m.ppl - self.baseline.ppl
        if metric == "accuracy" and m.task_accuracy_drop:
            return sum(m.task_accuracy_drop.values()) / len(m.task_accuracy_drop)
        return m.accuracy_drop

    def ranking(
        self, strategy: Strategy, metric: Metric | None = None, sync_point: Sublayer = "attention"
    ) -> list[int]:
        """Return the blocks, least sensitive first; ties (frequent in accuracy) fall to the lower KL."""
        value = self.sensitivity(strategy, metric, sync_point)
        kl = self.sensitivity(strategy, "kl", sync_point)
        return sorted(value, key=lambda block: (value[block], kl[block], block))
