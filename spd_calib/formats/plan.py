"""plan.json: what a runtime does at each sync point. A runtime needs `tensor_parallel`, `blocks`, `requires`."""

from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from .common import Count, Finite, ModelRef, Part, Provenance, Sha256, TensorParallel, TextRef
from .drops import SUBLAYERS, Drop, Drops, Groups, Point, Strategy
from .phases import ByPhase
from .profile import Comparison

Requirement = Literal[
    "mlp_drop", "compensation", "router_predictor", "quantised_sync", "replicated_heads", "two_phases"
]
MLPStrategy = Literal[Strategy.KEEP_SYNC, Strategy.BLOCK_DROP]
Bits = Literal[8, 6, 4]
Syncs = list[tuple[Strategy, int | None]]
"""The strategy and the bits of an attention's sync point, and of an MLP's."""


def field_of_bits(description: str) -> Any:
    """Return the field of a sync's bits, left out where the sync sends its message as it is."""
    return Field(default=None, exclude_if=lambda value: value is None, description=description)


class Budget(Part):
    """The bound that the plan was asked to keep. Fractions are fractions: 0.01 for 1 %."""

    kind: Literal[
        "max_kl", "max_ppl_increase", "max_accuracy_drop", "max_logprob_diff", "drop", "tau", "min_speedup", "max_bytes"
    ]
    value: Finite = Field(
        ge=0,
        description="For `drop` a number of sync points; for `tau` the paper's tau1; for `min_speedup` the share of a "
        "dense step's time to save, or of a `request`'s; for `max_bytes` the share of all syncs' bytes at 16 bits a "
        "value that may be sent",
    )
    tau2: Finite | None = Field(default=None, ge=0, description="The paper's second threshold, of `tau`")
    strategies: list[Strategy] = Field(min_length=1, description="What the plan was allowed to use")
    tasks: list[str] = Field(
        default_factory=list,
        description="For `max_accuracy_drop`: of these lm-eval tasks, on average; else of next tokens",
    )
    each_text: bool = Field(default=False, description="On each of the profile's texts; else on their mean")


class CompensationFile(Part):
    """The file beside the plan that holds the predictors' tensors, `blocks.<index>.ranks.<rank>.{bias,scale,a,b,w}`.

    Those of an MLP's sync point are called `blocks.<index>.mlp.ranks.<rank>.{bias,scale}`, those of a router
    `blocks.<index>.router.{bias,a,b,w}`.
    """

    file: str = Field(
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors$", description="A plain name: it lies in the plan's folder"
    )
    sha256: Sha256

    @classmethod
    def named_by(cls, sha256: str) -> Self:
        """Return the file of this content under a name that no other content has."""
        return cls(file=f"compensation-{sha256[:12]}.safetensors", sha256=sha256)


class Compensation(Part):
    """The form of the predictors by which a block's MLPs read more than their own rank's partial sum.

    The prediction is made from the rank's own head outputs z and its share: its partial sum or, where the attention's
    output goes through a norm before it joins the residual stream, that norm of it.
    """

    kind: Literal["mean", "low_rank", "full"] = Field(
        description="mean: share + bias; low_rank: share + bias + (z a) b; full: z w + bias"
    )
    rank: Count = Field(description="Of the low-rank predictor; 0 for the other kinds")

    scaled: bool = Field(
        default=False,
        exclude_if=lambda value: not value,
        description="The share times `scale`, which is then in `full`, too",
    )

    @model_validator(mode="after")
    def _rank_fits(self) -> Self:
        if (self.kind == "low_rank") != (self.rank > 0):
            raise ValueError(f"a {self.kind} compensation cannot have rank {self.rank}")
        return self


class RouterPredictor(Part):
    """Says what the router of a mixture of experts reads where the attention's sync point is dropped.

    The stream that all ranks share, and what this predictor makes of u = n1(x), x that stream before the attention; its
    weights are the same on every rank.
    """

    kind: Literal["zero", "mean", "low_rank", "full"] = Field(
        description="zero: nothing more; mean: bias; low_rank: bias + (u a) b; full: u w + bias"
    )
    rank: Count = Field(description="Of the low-rank predictor; 0 for the other kinds")

    @model_validator(mode="after")
    def _rank_fits(self) -> Self:
        if (self.kind == "low_rank") != (self.rank > 0):
            raise ValueError(f"a {self.kind} predictor of a router cannot have rank {self.rank}")
        return self


class Prefill(Part):
    """The treatment of a block's sync points in prefill, the forwards with more than one new token a sequence.

    A router whose attention's sync point is dropped reads the stream that all ranks share, nothing more.
    """

    strategy: Strategy = Field(description="The attention's sync point")
    mlp_strategy: MLPStrategy = Strategy.KEEP_SYNC
    sync_bits: Bits | None = field_of_bits("As of the block")
    mlp_sync_bits: Bits | None = field_of_bits("As of the block")

    @property
    def syncs(self) -> Syncs:
        """Return how the attention's sync point is treated in prefill, and the MLP's."""
        return [(self.strategy, self.sync_bits), (self.mlp_strategy, self.mlp_sync_bits)]


class PlannedBlock(Part):
    index: Count
    module: str = Field(min_length=1, description="Path of the decoder layer in the transformers model")
    strategy: Strategy = Field(description="The attention's sync point")
    mlp_strategy: MLPStrategy = Strategy.KEEP_SYNC
    sync_bits: Bits | None = field_of_bits("Bits of a value in the attention's sync, where it is kept")
    mlp_sync_bits: Bits | None = field_of_bits(
        "Bits of a value in the MLP's sync, where it is kept; what waits for it is in its message"
    )
    replicated: Groups | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description="By rank, the KV groups of other ranks that it computes, too, for what its MLP reads: a KV head "
        "and the query heads that it serves or, with more ranks than KV heads, one rank's query heads",
    )
    prefill: Prefill | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description="What prefill does with both sync points where that is not what decoding does, which is then what "
        "all other fields say",
    )
    recovery: Literal["distillation", "grouping+distillation"] | None = Field(
        default=None, description="Treatment the paper's rule asks for before this block may be dropped"
    )
    compensation: Compensation | None = Field(
        default=None, description="Predictors that this block's MLP reads by, in the file beside the plan"
    )
    mlp_compensation: Compensation | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description="Predictors of what this block's MLP adds, where its sync point is dropped and a norm follows",
    )
    router: RouterPredictor | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description="What the block's router reads, where it is a mixture of experts and its attention's sync point is "
        "dropped",
    )
    kl: Finite | None = Field(default=None, description="Cost of dropping the attention's sync point alone")
    mlp_kl: Finite | None = Field(default=None, description="Cost of dropping the MLP's sync point alone")
    reason: str = Field(description="Why the block is treated so, for people to read")

    @property
    def syncs(self) -> Syncs:
        """Return how the attention's sync point is treated in decoding, and the MLP's; in prefill, too, by default."""
        return [(self.strategy, self.sync_bits), (self.mlp_strategy, self.mlp_sync_bits)]

    @property
    def syncs_by_phase(self) -> list[Syncs]:
        """Return how the sync points are treated in prefill, and in decoding."""
        return [self.prefill.syncs if self.prefill else self.syncs, self.syncs]


def requirements(blocks: Sequence[PlannedBlock]) -> list[Requirement]:
    """Return what a plain runtime lacks and a plan of these blocks needs."""
    needed: dict[Requirement, bool] = {
        "mlp_drop": any(mlp != Strategy.KEEP_SYNC for b in blocks for _, (mlp, _) in b.syncs_by_phase),
        "compensation": any(b.compensation or b.mlp_compensation for b in blocks),
        "router_predictor": any(b.router for b in blocks),
        "quantised_sync": any(bits for b in blocks for syncs in b.syncs_by_phase for _, bits in syncs),
        "replicated_heads": any(b.replicated for b in blocks),
        "two_phases": any(b.prefill for b in blocks),
    }
    return [name for name, wanted in needed.items() if wanted]


class Predicted(Part):
    """The profile's estimate for the whole plan; from single measurements it is usually too low for large sets.

    Of a plan that `recover` wrote: what the whole cost on the text that decided what stayed.
    """

    kl: Finite = Field(description="By the interactions, where the profile has them; else from single costs")
    ppl_increase: Finite | None = Field(default=None, description="Sum of the single costs")
    accuracy_drop: Finite | None = Field(default=None, description="Sum of the single costs")


class Verified(Comparison):
    """The whole plan, measured on held-out text.

    Held-out text comes in rounds of as many sequences as the profile keeps for verifying. A round that shows a plan to
    break its budget has taken part in choosing the next plan, which is therefore verified on the round that follows.
    """

    text: TextRef
    as_served: bool = Field(
        default=False,
        exclude_if=lambda value: not value,
        description="Of the second half of each sequence alone, behind a first half that was read by the choice of "
        "prefill: the tokens are read by that of decoding, with the keys and values that prefill left",
    )
    reused: bool = Field(
        default=False,
        exclude_if=lambda value: not value,
        description="The held-out text (or, of a budget of lm-eval tasks, the documents) took part in choosing: it had "
        "shown an earlier plan to break the budget, and there was no further round to verify this plan on",
    )
    round: int = Field(
        default=0,
        ge=0,
        exclude_if=lambda value: not value,
        description="How many rounds of held-out text were used up before `text`",
    )


class Latency(Part):
    """One kind of step with every sync point and as planned, by the latency model: no promise (planning/latency.py)."""

    hardware: str = Field(min_length=1, description="As given: a file, or the name of a table that is shipped")
    phase: Literal["decode", "prefill"]
    batch: int = Field(gt=0)
    context: int = Field(gt=0, description="Tokens before the one decoded, or of the prompt")
    all_reduce_seconds: Finite = Field(ge=0, description="Time of one all-reduce")
    left_seconds: Finite = Field(
        default=0.0,
        ge=0,
        exclude_if=lambda value: not value,
        description="What a dropped sync leaves behind, where the engine fuses the all-reduce with the norm after it",
    )
    quantised_seconds: dict[int, Finite] = Field(
        default_factory=dict,
        exclude_if=lambda value: not value,
        description="Time of a quantised sync by its bits, of those that the plan has",
    )
    dense_seconds: Finite = Field(gt=0)
    planned_seconds: Finite = Field(gt=0)
    saved: Finite = Field(
        le=1, description="1 - planned / dense; below 0 where predictors cost more than the drops save"
    )
    ceiling: Finite = Field(ge=0, le=1, description="The same with every droppable sync point dropped")


class Request(Part):
    """One request by the latency model of both phases: its prompt is read, then its new tokens are decoded."""

    hardware: str = Field(min_length=1, description="As given: a file, or the name of a table that is shipped")
    batch: int = Field(gt=0)
    prompt: int = Field(gt=0, description="Tokens")
    new_tokens: int = Field(
        gt=0, description="Tokens: prefill gives the first, the others are decoded, each as behind the prompt alone"
    )
    dense_seconds: Finite = Field(gt=0)
    one_choice_seconds: Finite = Field(gt=0, description="With the best single choice for both phases")
    two_choices_seconds: Finite = Field(gt=0, description="With the best pair of choices of no more KL")
    planned_seconds: Finite = Field(gt=0)
    saved: Finite = Field(le=1, description="1 - planned / dense")


class Plan(Part):
    format: Literal["spd-calib/plan"] = "spd-calib/plan"
    version: Literal[1] = 1
    model: ModelRef
    tensor_parallel: TensorParallel
    requires: list[Requirement] = Field(
        default_factory=list,
        description="What a runtime must be able to do beyond the attention's strategies; refuse a plan that names "
        "something unknown",
    )
    compensation: CompensationFile | None = Field(
        default=None, description="The file of predictors, where blocks have a compensation"
    )
    recovered_from: ModelRef | None = Field(
        default=None, description="The dense model that `verified` compares with, where `recover` wrote the checkpoint"
    )
    profiled: ModelRef | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description="The model that the profile is of, where `model` is a quantised copy of it, which `verified` is of",
    )
    blocks: list[PlannedBlock] = Field(min_length=1)
    budget: Budget
    predicted: Predicted
    verified: Verified
    latency: list[Latency] = Field(default_factory=list, description="Where hardware was given")
    request: Request | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description="Where each phase could have a choice of its own, what a whole request takes",
    )
    provenance: Provenance

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if [b.index for b in self.blocks] != list(range(self.model.num_blocks)):
            raise ValueError(f"the blocks are not 0 to {self.model.num_blocks - 1}, each once and in order")
        if any(mlp != Strategy.KEEP_SYNC for _, (mlp, _) in self.blocks[-1].syncs_by_phase):
            raise ValueError("the last block's MLP sync point cannot be dropped")
        syncs = [sync for b in self.blocks for of_phase in b.syncs_by_phase for sync in of_phase]
        if any(bits is not None and strategy != Strategy.KEEP_SYNC for strategy, bits in syncs):
            raise ValueError("only a sync that is kept can have bits")
        replicated = [b for b in self.blocks if b.replicated is not None]
        if any(len(b.replicated or ()) != self.tensor_parallel.size for b in replicated):
            raise ValueError("`replicated` names the KV groups of each rank")
        if self.in_two_phases and (replicated or self.compensation is not None):
            raise ValueError("a plan with a choice for each phase has neither predictors nor replicated heads")
        _ = self.by_phase  # which has rules of its own
        if any(b.compensation and b.strategy != Strategy.BLOCK_DROP for b in self.blocks):
            raise ValueError("only a block whose strategy is block_drop can have a compensation")
        if any(b.router and b.strategy != Strategy.BLOCK_DROP for b in self.blocks):
            raise ValueError("only the router of a block whose strategy is block_drop needs to be told what to read")
        predicted = [b for b in self.blocks if b.compensation or b.mlp_compensation]
        stored = bool(predicted) or any(b.router and b.router.kind != "zero" for b in self.blocks)
        if stored != (self.compensation is not None):
            raise ValueError("blocks with predictors need the file that holds them, in `compensation`")
        if sorted(self.requires) != sorted(requirements(self.blocks)):
            needed = ", ".join(requirements(self.blocks)) or "nothing"
            raise ValueError(f"`requires` says {', '.join(self.requires) or 'nothing'}, its blocks need {needed}")
        return self

    @property
    def in_two_phases(self) -> bool:
        """Say whether prefill has a choice of its own."""
        return any(b.prefill for b in self.blocks)

    @property
    def drops(self) -> Drops:
        """Return what the plan drops, in decoding where prefill has a choice of its own.

        It is without its predictors; models.plan_files.load_plan brings them along.
        """
        return self._drops([b.syncs for b in self.blocks])

    @property
    def by_phase(self) -> ByPhase:
        """Return what the plan drops in prefill and in decoding, without its predictors."""
        if not self.in_two_phases:
            return ByPhase.of(self.drops)
        return ByPhase(*map(self._drops, zip(*(b.syncs_by_phase for b in self.blocks), strict=True)))

    def _drops(self, syncs: Sequence[Syncs]) -> Drops:
        """Return the drops that treat each block's sync points so."""
        return Drops(
            {
                Point(b.index, sublayer): Drop(
                    strategy, bits=bits, replicated=b.replicated if sublayer == "attention" else None
                )
                for b, of_block in zip(self.blocks, syncs, strict=True)
                for sublayer, (strategy, bits) in zip(SUBLAYERS, of_block, strict=True)
            }
        )
