"""The inputs of a profile, or of an estimate of one: a model, its text and the experiments to run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from spd_calib.errors import InputError
from spd_calib.formats.common import TextRef
from spd_calib.formats.drops import Point
from spd_calib.parallel.session import Session
from spd_calib.sensitivity import profile as profiling
from spd_calib.sensitivity.averaging import joint_ref
from spd_calib.sensitivity.measure import Subject
from spd_calib.sensitivity.profile import Experiment
from spd_calib.sensitivity.text import Text

from .method import Method
from .norm_estimates import give_estimates
from .opening import Model, open_model, resolved_for
from .options import RunOptions
from .progress import Progress
from .recovered import RecoveredCheckpoint, find_recovered, lengths_of_then
from .tasks import TaskOptions
from .text import NOTHING_FITTED, TextSelection, load_texts_for


@dataclass(frozen=True)
class ProfileInputs:
    """A model, its text and a method, before any weight is loaded."""

    session: Session
    recovered: RecoveredCheckpoint | None
    texts: list[Text]
    asked: Method
    run: RunOptions

    @property
    def refs(self) -> tuple[TextRef, TextRef]:
        """Return the references of the text to measure on and of the text to verify on."""
        return joint_ref([t.calibration_ref() for t in self.texts]), joint_ref(
            [t.verification_ref() for t in self.texts]
        )

    def subject(self, progress: Progress) -> Subject:
        """Load the model; `progress` is told what will be measured."""
        run = self.run
        for text in self.texts:
            if text.note:
                progress.say(text.note)
        if self.recovered:
            subject = self.recovered.subject(self.session, run)
        else:
            subject = Subject(self.session.load(run.device, str(run.dtype), seed=run.seed, stream=run.stream))
        if subject.lm.streamed:
            progress.say("the weights are read from disk, block by block, as they are needed")
        if self.session.ref.quantised:
            progress.say(f"the checkpoint is quantised, {self.session.ref.quantised}")
        calibration, verification = self.refs
        progress.say(
            f"{self.session.ref.architecture}, {subject.lm.num_blocks} blocks, TP {self.session.tp}: "
            f"{calibration.sequences} sequences to measure on, {verification.sequences} kept for verifying"
        )
        if self.recovered:
            progress.say(self.recovered.described())
        return subject

    def fit_estimates(self, subject: Subject, progress: Progress) -> list[Point]:
        """Have the model read fitted estimates where a branch's norm waits for a sum; return these sync points."""
        return give_estimates(subject, self.texts, batch_size=self.run.batch_size, progress=progress)

    def experiments(self, subject: Subject) -> list[Experiment]:
        """Return the experiments to run. Raises InputError where there are none."""
        rows = profiling.experiments(
            self.asked.name,  # type: ignore[arg-type]
            self.asked.strategies,
            num_blocks=subject.lm.num_blocks,
            sync_points=self.asked.sync_points,
            always=subject.always,
        )
        if found := list(rows):
            return found
        raise InputError(
            f"{self.session.ref.id} drops every such sync point already; there is nothing left to profile."
        )


def open_inputs(
    model: Model,
    *,
    tp: int,
    data: str | Path | Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase | None,
    text: TextSelection,
    asked: Method,
    run: RunOptions,
    tasks: TaskOptions | None,
) -> ProfileInputs:
    """Open the model and read its text, sequence by sequence; no weight is loaded.

    Raises InputError for a model or a text that cannot be used, and for what cannot be asked of a recovered checkpoint.
    """
    names = [str(name) for name in ([data] if isinstance(data, str | Path) else data)]
    if len(names) > 1 and asked.confidence is not None:
        raise InputError("Several texts are measured to their end: leave `confidence` out.")
    session = open_model(model, tp=tp, tokenizer=tokenizer)
    resolved, recovered, fitted = resolved_for(session, run), find_recovered(session), NOTHING_FITTED
    if recovered:
        if asked.name != "single" or asked.confidence is not None or tasks or len(names) > 1:
            raise InputError(
                "A recovered checkpoint is profiled by `method` single on one text of `data`, without `confidence` "
                "and `tasks`: leave them out."
            )
        text, fitted = lengths_of_then(recovered, text), recovered.documents
    return ProfileInputs(session, recovered, load_texts_for(session, names, text, fitted=fitted), asked, resolved)
