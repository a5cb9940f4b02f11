"""Estimating what a profile would take, before it is measured."""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from spd_calib.sensitivity import estimate as estimating
from spd_calib.sensitivity.estimate import Estimate

from .method import TARGET_STDERR, checked_method
from .opening import Model
from .options import RunOptions
from .profile_inputs import open_inputs
from .progress import SILENT, Progress
from .tasks import TaskOptions
from .text import TextSelection


def estimate_profile(
    model: Model,
    *,
    tp: int,
    data: str | Path | Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase | None = None,
    text: TextSelection = TextSelection(),
    method: str = "single",
    strategies: Sequence[str] | None = None,
    sync_points: Sequence[str] = ("attention",),
    target_stderr: float | None = None,
    confidence: float | None = None,
    rank_by: str | None = None,
    tasks: TaskOptions | None = None,
    run: RunOptions = RunOptions(),
    progress: Progress = SILENT,
) -> Estimate:
    """Return what `profile` would take with the same arguments: timed on the first sequences, nothing is written.

    What would be run is told to `progress`. Raises InputError as `profile` does.
    """
    asked = checked_method(
        method,
        strategies=strategies,
        sync_points=sync_points,
        target_stderr=target_stderr,
        confidence=confidence,
        rank_by=rank_by,
        tasks=tasks is not None,
    )
    inputs = open_inputs(model, tp=tp, data=data, tokenizer=tokenizer, text=text, asked=asked, run=run, tasks=tasks)
    subject, size = inputs.subject(progress), inputs.run.batch_size
    texts = [t.calibration for t in inputs.texts]
    if asked.name == "fisher":
        target = asked.target_stderr or TARGET_STDERR
        each, samples = zip(
            *(
                estimating.estimate_fisher(
                    subject.lm, t, sync_points=asked.sync_points, target_stderr=target, batch_size=size
                )
                for t in texts
            ),
            strict=True,
        )
        fewest = min(samples)
        what = f"one pass forward and backward with {fewest} samples a sequence, more where the error asks for it"
    else:
        rows = inputs.experiments(subject)
        plans = [row.drops for row in rows]
        each = tuple(estimating.estimate(subject.lm, t, plans=plans, batch_size=size) for t in texts)
        what = f"{len(rows)} experiments and the dense model"
    found = estimating.one_after_another(each)
    progress.say(
        f"would be run: {what}, on {found.batches} batches, {found.tokens} tokens; as much as {found.forwards:.1f} "
        "forwards of them"
    )
    if tasks:
        progress.say(
            "not counted: the lm-eval tasks, once for the dense model and once for each of "
            f"{len(inputs.experiments(subject))} experiments"
        )
    return found
