"""The plan of a recovered checkpoint: the old plan's drops, with the predictors and the figures of the new weights."""

from collections.abc import Sequence
from dataclasses import dataclass

from spd_calib.formats.common import ModelRef, Provenance, TextRef
from spd_calib.formats.plan import (
    CompensationFile,
    Plan,
    PlannedBlock,
    Predicted,
    Requirement,
    RouterPredictor,
    Verified,
)
from spd_calib.models.plan_files import form_of
from spd_calib.sensitivity.metrics import Tally
from spd_calib.sensitivity.tiers import Tier

from .planned_model import PlannedModel
from .report import RecoveryReport
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
    provenance: Provenance,
) -> Plan:
    """Return the plan for the checkpoint that was made of `plan` and holds the weights of `model`."""
    c = measured.judged.comparison()
    return Plan(
        model=checkpoint,
        tensor_parallel=plan.tensor_parallel,
        requires=_requirements(plan, model),
        compensation=predictors,
        recovered_from=plan.model,
        blocks=[_block(b, model, report) for b in plan.blocks],
        budget=plan.budget,
        predicted=Predicted(kl=c.kl, ppl_increase=c.ppl_increase, accuracy_drop=c.accuracy_drop),
        verified=Verified(**vars(measured.verified.comparison()), text=measured.text),
        provenance=provenance,
    )


def _requirements(plan: Plan, model: PlannedModel) -> list[Requirement]:
    """Return what the plan needed of a runtime, and, of predictors for the ranks' MLPs, what it needs now."""
    needed: list[Requirement] = [name for name in plan.requires if name != "compensation"]
    predicted = any(drop.predictors for drop in model.drops.by_point.values())
    return [*needed, "compensation"] if predicted else needed


def _block(block: PlannedBlock, model: PlannedModel, report: RecoveryReport) -> PlannedBlock:
    student = model.students.get(block.index)
    if student is None:
        return block
    return block.model_copy(
        update={
            "strategy": student.strategy,
            "recovery": None,
            "compensation": form_of(student.drops, student.block.attention_point),
            "mlp_compensation": form_of(student.drops, student.block.mlp_point),
            "router": _router(block, student),
            "kl": None,  # of the block before it was treated
            "reason": _reason(report.tiers.get(block.index), report.kept(block.index)),
        }
    )


def _router(block: PlannedBlock, student: Student) -> RouterPredictor | None:
    """Return what the block's router reads now; None where it has none, or reads what it did in the dense model."""
    if block.router is None or student.router is None:
        return block.router
    return RouterPredictor(kind=student.router.kind, rank=student.router.rank)


def _reason(tier: Tier | None, kept: Sequence[str]) -> str:
    done = "recovered by " + ", ".join(dict.fromkeys(kept)) if kept else "left as it is: no treatment helped the whole"
    return f"{tier}; {done}" if tier != "insensitive" else "insensitive: dropped as it is"
