"""From a plan to what recovery should treat, and from what it did to the new plan."""

from collections.abc import Sequence

from spd_calib.errors import InputError
from spd_calib.formats.common import ModelRef, Provenance, Strategy, TextRef
from spd_calib.formats.plan import Compensation, CompensationFile, Plan, PlannedBlock, Predicted, Verified
from spd_calib.sensitivity.metrics import Tally
from spd_calib.sensitivity.tiers import Tier, thresholds, tiers

from .planned import PlannedModel
from .report import Report

PAPER: dict[str | None, Tier] = {
    None: "insensitive",
    "distillation": "sensitive",
    "grouping+distillation": "extremely sensitive",
}


def strategies(plan: Plan) -> tuple[tuple[Strategy, ...], tuple[Strategy, ...]]:
    """Of the attention's and the MLP's sync points: blocks a plan keeps until they are treated are dropped now."""
    attention = tuple(Strategy.BLOCK_DROP if b.recovery else b.strategy for b in plan.blocks)
    return attention, plan.mlp_strategies


def tiers_of(plan: Plan, tau1: float | None, tau2: float | None) -> tuple[dict[int, Tier], str]:
    """Each dropped block's tier, and a sentence that says where it comes from.

    A plan by the paper's rule says it itself; else the block's own KL against tau1 and tau2 (sensitivity.tiers).
    Raises InputError for a plan that drops nothing or that was recovered before.
    """
    if plan.compensation is not None or plan.recovered_from is not None:
        raise InputError(f"{plan.model.id} was recovered already; recover the plan it was made from instead.")
    attention, _ = strategies(plan)
    dropped = [b for b in plan.blocks if attention[b.index] != Strategy.KEEP_SYNC]
    if not dropped:
        raise InputError("The plan drops no attention's sync point, so there is nothing to recover; raise its budget.")
    if plan.budget.kind == "tau" and tau1 is None and tau2 is None:
        return {b.index: PAPER[b.recovery] for b in dropped}, (
            f"tiers by the plan's own thresholds, perplexity +{plan.budget.value:.4g} and +{plan.budget.tau2 or 0:.4g}"
        )
    kl = {b.index: b.kl if b.kl is not None else float("inf") for b in dropped}
    known = {index: value for index, value in kl.items() if value != float("inf")}
    low, high = thresholds(known, tau1, tau2)
    whence = "given" if tau1 is not None else "a quarter of the dropped blocks' mean KL, and the mean"
    return tiers(kl, low, high), f"tiers by each block's own KL, thresholds {low:.4g} and {high:.4g} ({whence})"


def new_plan(
    plan: Plan,
    model: PlannedModel,
    report: Report,
    judged: Tally,
    verified: Tally,
    verified_text: TextRef,
    ref: ModelRef,
    beside: CompensationFile | None,
    provenance: Provenance,
) -> Plan:
    """`plan` for the recovered checkpoint `ref`. `judged`: on the text that decided; `verified`: on other text."""
    c = judged.comparison()
    return Plan(
        model=ref,
        tensor_parallel=plan.tensor_parallel,
        requires=[*(r for r in plan.requires if r != "compensation"), *(["compensation"] if beside else [])],  # type: ignore[list-item]
        compensation=beside,
        recovered_from=plan.model,
        blocks=[_block(b, model, report) for b in plan.blocks],
        budget=plan.budget,
        predicted=Predicted(kl=c.kl, ppl_increase=c.ppl_increase, accuracy_drop=c.accuracy_drop),
        verified=Verified(**vars(verified.comparison()), text=verified_text),
        provenance=provenance,
    )


def _block(block: PlannedBlock, model: PlannedModel, report: Report) -> PlannedBlock:
    student = model.students.get(block.index)
    if student is None:
        return block
    predictors, kept = student.compensation, report.kept(block.index)
    form = Compensation(kind=predictors[0].kind, rank=predictors[0].rank) if predictors else None
    return block.model_copy(
        update={
            "strategy": student.block.attention_strategy,
            "recovery": None,
            "compensation": form,
            "kl": None,  # of the block before it was treated
            "reason": _reason(report.tiers.get(block.index), kept),
        }
    )


def _reason(tier: Tier | None, kept: Sequence[str]) -> str:
    done = "recovered by " + ", ".join(dict.fromkeys(kept)) if kept else "left as it is: no treatment helped the whole"
    return f"{tier}; {done}" if tier != "insensitive" else "insensitive: dropped as it is"
