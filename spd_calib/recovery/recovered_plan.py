"""The plan of a recovered checkpoint: the old plan's drops, with the predictors and the figures of the new weights."""

from collections.abc import Sequence
from dataclasses import dataclass

from spd_calib.formats.common import ModelRef, Provenance, TextRef
from spd_calib.formats.plan import CompensationFile, Plan, PlannedBlock, Predicted, Verified
from spd_calib.models.plan_files import form_of
from spd_calib.sensitivity.metrics import Tally
from spd_calib.sensitivity.tiers import Tier

from .planned_model import PlannedModel
from .report import RecoveryReport


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
        requires=[*(r for r in plan.requires if r != "compensation"), *(["compensation"] if predictors else [])],  # type: ignore[list-item]
        compensation=predictors,
        recovered_from=plan.model,
        blocks=[_block(b, model, report) for b in plan.blocks],
        budget=plan.budget,
        predicted=Predicted(kl=c.kl, ppl_increase=c.ppl_increase, accuracy_drop=c.accuracy_drop),
        verified=Verified(**vars(measured.verified.comparison()), text=measured.text),
        provenance=provenance,
    )


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
            "kl": None,  # of the block before it was treated
            "reason": _reason(report.tiers.get(block.index), report.kept(block.index)),
        }
    )


def _reason(tier: Tier | None, kept: Sequence[str]) -> str:
    done = "recovered by " + ", ".join(dict.fromkeys(kept)) if kept else "left as it is: no treatment helped the whole"
    return f"{tier}; {done}" if tier != "insensitive" else "insensitive: dropped as it is"
