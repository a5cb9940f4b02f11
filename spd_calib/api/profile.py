"""Profiling a model: from the model and text to what dropping each sync point costs."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from spd_calib.formats.common import TensorParallel
from spd_calib.formats.drops import Drops, Point, Strategy
from spd_calib.formats.profile import Baseline, Comparison, Fisher, Measurement, Profile
from spd_calib.parallel.session import versions
from spd_calib.ranks import world_size
from spd_calib.reporting.table import nats
from spd_calib.sensitivity import profile as profiling
from spd_calib.sensitivity.averaging import average_fisher, average_profile
from spd_calib.sensitivity.fisher import predict
from spd_calib.sensitivity.journal import JournalOfText, MeasurementJournal
from spd_calib.sensitivity.measure import Subject
from spd_calib.sensitivity.metrics import Tally
from spd_calib.sensitivity.profile import Experiment, TaskAccuracy

from .method import TARGET_STDERR, checked_method
from .opening import Model
from .options import RunOptions
from .profile_inputs import ProfileInputs, open_inputs
from .progress import SILENT, Progress
from .provenance import provenance
from .tasks import TaskOptions
from .text import TextSelection


def profile(
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
    journal: Path | None = None,
    progress: Progress = SILENT,
) -> Profile:
    """Measure what dropping each sync point of `model` costs on `tp` ranks, and return the profile.

    Args:
        model: a hub id, a folder, 'demo', or a transformers model in memory, which stays as it is.
        tp: number of tensor-parallel ranks.
        data: one or several texts: 'demo', a file, or a hub data set as NAME:CONFIG:SPLIT.
        tokenizer: of a model in memory.
        text: which sequences of the texts are used.
        method: 'single' drops each sync point alone; 'cumulative' is the paper's, from the last block backwards;
            'fisher' predicts all costs and interactions from one pass forward and backward.
        strategies: 'block_drop', 'plain_drop' (default: both; of fisher, or with experts, block_drop alone).
        sync_points: 'attention', 'mlp' or both.
        target_stderr: of fisher, the relative error that sampling may leave (default: 0.08).
        confidence: of single, measure a sync point only until its tier is that certain (default: on all sequences).
        rank_by: 'accuracy', 'kl' or 'ppl' (default: accuracy; of fisher, kl).
        tasks: lm-eval tasks, by whose accuracy blocks are ranked.
        run: device, dtype, batch size, seed.
        journal: a file that keeps what was measured, so that a run that was killed goes on when called again. It
            stays; remove it once the profile is written.
        progress: callbacks, told how far it is.

    Raises InputError for a model, a text or an option that cannot be used.
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
    with nullcontext() if journal is None else MeasurementJournal(journal, _identity(inputs, tasks)) as kept:
        suite = tasks.with_batch_size(run.batch_size).load() if tasks else None
        subject = inputs.subject(progress)
        if subject.lm.mixtures and Strategy.PLAIN_DROP in asked.strategies:
            if strategies is not None:
                subject.lm.fitted(Drops.of({Point(0, "attention"): Strategy.PLAIN_DROP}))  # refuses, and says why
            inputs = replace(inputs, asked=replace(asked, strategies=[Strategy.BLOCK_DROP]))
        estimated = inputs.fit_estimates(subject, progress)
        if kept and kept.finished:
            progress.say(f"going on from {kept.path}: {kept.finished} measurements are finished")
        several = len(inputs.texts) > 1
        journals = [kept.of_text(i) if kept and several else kept for i in range(len(inputs.texts))]
        found = _run(inputs, subject, progress=progress, suite=suite, journals=journals)
    recovered, calibration, verification = inputs.recovered, *inputs.refs
    return Profile(
        model=inputs.session.ref,
        tensor_parallel=TensorParallel(size=tp),
        method=asked.name,  # type: ignore[arg-type]
        rank_by=asked.rank_by,
        text=calibration,
        verify_text=verification,
        baseline=found.baseline,
        measurements=found.measurements,
        estimated=estimated,
        fisher=found.fisher,
        recovered=recovered.part(found.alone) if recovered and found.alone else None,
        provenance=provenance(inputs.run),
    )


def _identity(inputs: ProfileInputs, tasks: TaskOptions | None) -> dict[str, Any]:
    """Return what must be the same for a journal to go on from."""
    asked, run = inputs.asked, inputs.run
    names = None if tasks is None else [",".join(tasks.names), str(tasks.include_path), repr(tasks.options)]
    return {
        "model": inputs.session.ref.model_dump(mode="json", exclude={"id"}),
        "text": inputs.refs[0].sha256,
        "tensor parallel size": inputs.session.tp,
        "method": [asked.name, asked.target_stderr, asked.confidence],
        "list of experiments": [asked.strategies, asked.sync_points],
        "batch size": run.batch_size,
        "lm-eval tasks": names,
        "seed": run.seed,
        "recovered checkpoint": inputs.recovered and inputs.recovered.sha256,
        "device, dtype or number of real ranks": [run.device, run.dtype, world_size()],
        "version of spd-calib, torch or transformers": versions(),
    }


@dataclass(frozen=True)
class _Found:
    baseline: Baseline
    measurements: list[Measurement]
    fisher: Fisher | None = None
    alone: Comparison | None = None  # what a recovered checkpoint costs with nothing dropped beside its own


def _run(
    inputs: ProfileInputs,
    subject: Subject,
    *,
    progress: Progress,
    suite: Any,
    journals: Sequence[MeasurementJournal | JournalOfText | None],
) -> _Found:
    if inputs.asked.name == "fisher":
        return _predict(inputs, subject, progress=progress, journals=journals)
    accuracy: TaskAccuracy | None = None
    if suite is not None:
        accuracy = partial(suite.accuracy, subject.lm, inputs.session.tokenizer)
    return _measure(inputs, subject, progress=progress, journals=journals, accuracy=accuracy)


def _predict(
    inputs: ProfileInputs,
    subject: Subject,
    *,
    progress: Progress,
    journals: Sequence[MeasurementJournal | JournalOfText | None],
) -> _Found:
    predicted, asked, run = [], inputs.asked, inputs.run
    for text, journal in zip(inputs.texts, journals, strict=True):
        passes = _Passes(progress, math.ceil(len(text.calibration) / run.batch_size))
        predicted.append(
            predict(
                subject.lm,
                text.calibration,
                sync_points=asked.sync_points,
                target_stderr=asked.target_stderr or TARGET_STDERR,
                batch_size=run.batch_size,
                seed=run.seed,
                tick=passes.step,
                journal=journal,
            )
        )
    baseline, fisher = average_fisher(predicted)
    progress.say(
        f"{fisher.samples} samples a sequence, which leave {100 * fisher.sampling_error:.1f} % of error in a KL"
    )
    return _Found(baseline, [], fisher)


class _Passes:
    """Tells `progress` of passes over a text as they begin: the error found may ask for another."""

    def __init__(self, progress: Progress, batches: int):
        self.progress, self.batches, self.done = progress, batches, 0

    def step(self) -> None:
        if self.done % self.batches == 0:
            self.progress.expect(self.batches)
        self.done += 1
        self.progress.step("")


def _measure(
    inputs: ProfileInputs,
    subject: Subject,
    *,
    progress: Progress,
    journals: Sequence[MeasurementJournal | JournalOfText | None],
    accuracy: TaskAccuracy | None,
) -> _Found:
    rows, run = inputs.experiments(subject), inputs.run
    batches = sum(math.ceil(len(t.calibration) / run.batch_size) for t in inputs.texts)
    progress.expect(len(rows) * (batches + bool(accuracy)))
    ticking = _Ticking(progress, rows)
    each, alone = [], None
    for number, (text, journal) in enumerate(zip(inputs.texts, journals, strict=True)):
        baseline, measurements, alone = profiling.profile(
            subject,
            text.calibration,
            rows=rows,
            batch_size=run.batch_size,
            tick=ticking.tick,
            task_accuracy=accuracy if number == 0 else None,
            journal=journal,
            confidence=inputs.asked.confidence,
        )
        each.append((baseline, measurements))
    baseline, measurements = average_profile(each)
    if early := sum(m.stopped_early for m in measurements):
        progress.say(
            f"{early} of {len(measurements)} sync points needed less than all {inputs.refs[0].sequences} sequences: "
            "their tier by KL was certain enough"
        )
    return _Found(baseline, measurements, alone=alone)


class _Ticking:
    """Tells `progress` of each batch of each experiment, and of the very first one in a sentence."""

    def __init__(self, progress: Progress, rows: Sequence[Experiment]):
        self.progress, self.rows, self.said = progress, rows, False

    def tick(self, i: int, tally: Tally | None) -> None:
        row = self.rows[i]
        note = f"{row.point} {row.strategy}" + ("" if tally is None else f": KL {nats(tally.kl())}")
        if tally is not None and not self.said:
            self.said = True
            self.progress.say(f"first batch: {note}")
        self.progress.step(note)
