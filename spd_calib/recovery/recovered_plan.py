"""The plan of a recovered checkpoint: the old plan's drops, with the predictors and the figures of the new weights."""

from dataclasses import dataclass

from spd_calib.formats.common import ModelRef, Provenance, TextRef
from spd_calib.formats.drops import Strategy
from spd_calib.formats.plan import (
    Budget,
    CompensationFile,
    Plan,
    PlannedBlock,
    Predicted,
    RouterPredictor,
    Verified,
    requirements,
)
from spd_calib.models.plan_files import form_of
from spd_calib.sensitivity.metrics import Tally

from .planned_model import PlannedModel
from .report import REPLICATED, RecoveryReport
from .student import Student


@dataclass(frozen=True)
class Measured:
    """The costs of the recovered model: `judged` on the text that decided, `verified` on other text, `text`."""

    judged: Tally
    verified: Tally
    text: TextRef


def recovered_plan(
    plan: Plan,
    model: PlannedModel,
    *,
    checkpoint: ModelRef,
    predictors: CompensationFile | None,
    report: RecoveryReport,
    measured: Measured,
    budget: Budget | None,
    provenance: Provenance,
) -> Plan:
    """Return the plan for the checkpoint that was made of `plan` and holds the weights of `model`.

    `budget` is the one that it was to keep after recovery, if there was one.
    """
    c = measured.judged.comparison()
    blocks = [_block(b, model, report) for b in plan.blocks]
    return Plan(
        model=checkpoint,
        tensor_parallel=plan.tensor_parallel,
        requires=requirements(blocks),
        compensation=predictors,
        recovered_from=plan.model,
        blocks=blocks,
        budget=budget or plan.budget,
        predicted=Predicted(kl=c.kl, ppl_increase=c.ppl_increase, accuracy_drop=c.accuracy_drop),
        verified=Verified(**vars(measured.verified.comparison()), text=measured.text),
        provenance=provenance,
    )


def _block(block: PlannedBlock, model: PlannedModel, report: RecoveryReport) -> PlannedBlock:
    student = model.students.get(block.index)
    treated = block.recovery is not None or any(strategy != Strategy.KEEP_SYNC for strategy, _ in block.syncs)
    if student is None and treated:  # it was given back
        nothing = dict.fromkeys(("recovery", "compensation", "mlp_compensation", "router", "replicated"))
        kept = dict.fromkeys(("strategy", "mlp_strategy"), Strategy.KEEP_SYNC)
        return block.model_copy(update={**nothing, **kept, "reason": "kept again: without it the budget is broken"})
    if student is None:
        return block
    return block.model_copy(
        update={
            "strategy": student.strategy,
            "mlp_strategy": student.drops.strategy(student.block.mlp_point),
            "replicated": student.replicated,
            "recovery": None,
            "compensation": form_of(student.drops, student.block.attention_point),
            "mlp_compensation": form_of(student.drops, student.block.mlp_point),
            "router": _router(student),
            "kl": None,  # of the block before it was treated, as the next
            "mlp_kl": None,
            "reason": "; ".join([*([block.reason] if block.replicated else []), _reason(report, block.index)]),
        }
    )


def _router(student: Student) -> RouterPredictor | None:
    """Return what the block's router reads; None where it has none, or reads what it did in the dense model."""
    if student.parts.experts is None or student.strategy != Strategy.BLOCK_DROP:
        return None
    if student.router is None:
        return RouterPredictor(kind="zero", rank=0)
    return RouterPredictor(kind=student.router.kind, rank=student.router.rank)


def _reason(report: RecoveryReport, block: int) -> str:
    """Return what was done to a block, and its tier, where it has one: a plain drop beside others has none."""
    tried, tier = report.of(block), report.tiers.get(block)
    kept = dict.fromkeys(attempt.treatment for attempt in tried if attempt.kept)
    done = ", ".join(treatment for treatment in kept if treatment != REPLICATED)
    if (replicated := next((a for a in tried if a.treatment == REPLICATED), None)) is not None:
        said = f"all heads of other ranks replicated: KL {replicated.fell:.3g} less than recovered"
        said += f"; {done}" if done else ""
    elif done:
        said = f"recovered by {done}"
    else:
        said = "left as it is: no treatment helped" if tried else "dropped as it is"
    return f"{tier}; {said}" if tier else said
