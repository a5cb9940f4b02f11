"""Estimates behind norms, as profiles and plans use them: fitted on the text to measure on, kept beside the plan."""

import hashlib
from collections.abc import Sequence

from safetensors.torch import save
from torch import Tensor

from spd_calib.formats.drops import Drops, Point
from spd_calib.formats.plan import CompensationFile, Plan, PlannedBlock
from spd_calib.models.plan_files import form_of, predictor_tensors
from spd_calib.parallel.distributed import from_all_ranks
from spd_calib.sensitivity.measure import Subject
from spd_calib.sensitivity.norm_estimates import fit_estimates
from spd_calib.sensitivity.text import Text

from .progress import Progress


def give_estimates(subject: Subject, texts: Sequence[Text], *, batch_size: int, progress: Progress) -> list[Point]:
    """Have the subject's model read fitted estimates where a branch's norm waits for a sum; return these sync points.

    They are fitted on the text to measure on, the same from a profile and from a plan of it.
    """
    sequences = [ids for text in texts for ids in text.calibration]
    subject.lm.estimates = fit_estimates(subject.lm, sequences, always=subject.always, batch_size=batch_size)
    points = list(subject.lm.estimates)
    if points:
        progress.say(
            f"{len(points)} sync points have a norm behind them: where one is dropped, ranks read an estimate (a scale "
            f"and a mean for each channel, free at run time), fitted on these {len(sequences)} sequences"
        )
    return points


def with_estimates(plan: Plan, subject: Subject) -> tuple[Plan, bytes | None]:
    """Return the plan with the estimates that its drops were measured with, and the content of their file.

    That file, which the plan names, holds the predictors of a recovered checkpoint as well. None, and the plan as it
    is, where there are no estimates. Under torchrun all ranks call this at once.
    """
    # of what is always so the dropped points: their predictors; bits of syncs that are kept stand in the plan
    drops = subject.lm.fitted(plan.drops | subject.always.only(subject.always.points))
    if not any(drops.at(point).predictors is not None for point in subject.lm.estimates):
        return plan, None
    tensors: dict[str, Tensor] = {}
    for of_rank in from_all_ranks(predictor_tensors(drops)):
        tensors |= of_rank
    content = save(dict(sorted(tensors.items())))
    changed = {
        "blocks": [_with_forms(block, drops) for block in plan.blocks],
        "requires": list(dict.fromkeys([*plan.requires, "compensation"])),
        "compensation": CompensationFile.named_by(hashlib.sha256(content).hexdigest()),
    }
    return plan.model_copy(update=changed), content


def _with_forms(block: PlannedBlock, drops: Drops) -> PlannedBlock:
    attention, mlp = (form_of(drops, Point(block.index, kind)) for kind in ("attention", "mlp"))
    return block.model_copy(update={"compensation": attention, "mlp_compensation": mlp})
