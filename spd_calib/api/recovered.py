"""A checkpoint that `recover` wrote: its plan and predictors, and the dense model that it was made from."""

from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from spd_calib.errors import InputError
from spd_calib.formats.drops import NOTHING_DROPPED, SUBLAYERS, Drops, Point
from spd_calib.formats.files import read, sha256_of
from spd_calib.formats.plan import CompensationFile, Plan
from spd_calib.formats.profile import Comparison, Profile, Recovered
from spd_calib.formats.recovery import REPORT_FILE, Recovery
from spd_calib.models.plan_files import load_drops
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.parallel.session import Session, check_same_model, is_quantised_copy
from spd_calib.sensitivity.documents import TEXT
from spd_calib.sensitivity.measure import Subject
from spd_calib.sensitivity.text import Fitted

from .opening import Model, named_by, open_model, open_model_of
from .options import RunOptions
from .text import TextSelection


@dataclass(frozen=True)
class RecoveredCheckpoint:
    """The part of a checkpoint that `recover` alone writes; `plan` was read from `path`."""

    plan: Plan
    path: Path

    @property
    def sha256(self) -> str:
        return sha256_of(self.path)

    @property
    def drops(self) -> Drops:
        """Return what the checkpoint drops always, with its predictors. Raises InputError as plan_files.load_drops."""
        return load_drops(self.plan, self.path)

    def subject(self, session: Session, run: RunOptions, *, tried: Drops = NOTHING_DROPPED) -> Subject:
        """Return the recovered model, what it drops always, and the dense one it was made from, as `run` says.

        The session is the checkpoint's own, `run` is resolved; it can run the replicated heads of `tried`, too.
        """
        always = self.drops
        lm = session.load(run.device, str(run.dtype), seed=run.seed, stream=run.stream, drops=always | tried)
        return Subject(lm, always, load_original(self.plan, run, path=self.path))

    @property
    def documents(self) -> Fitted:
        """Return what it was fitted on, as TextOptions.fitted. Raises InputError where recovery.json does not say."""
        path = self.path.with_name(REPORT_FILE)
        if not path.is_file():
            raise InputError(
                f"{path} is missing, which says on what text this checkpoint was fitted: measured on that it would "
                "look better than it is; put it back, or recover again."
            )
        return read(Recovery, path).documents

    def described(self) -> str:
        """Return in a sentence what it is."""
        assert self.plan.recovered_from is not None
        return (
            f"recovered from {self.plan.recovered_from.id}, which everything is compared with; "
            f"{len(self.plan.drops)} sync points stay dropped"
        )

    def part(self, alone: Comparison) -> Recovered:
        """Return what a profile says of it; `alone` is what it costs with nothing dropped but what it drops always."""
        assert self.plan.recovered_from is not None
        return Recovered(
            recovered_from=self.plan.recovered_from,
            plan_sha256=self.sha256,
            settled=[Point(b, sublayer) for sublayer in SUBLAYERS for b in self.plan.drops.blocks(sublayer)],
            alone=alone,
        )

    def predictors(self) -> tuple[CompensationFile, bytes] | None:
        """Return the predictors' file for another plan of this checkpoint, under a name of its own, and its content."""
        own = self.plan.compensation
        if own is None:
            return None
        return CompensationFile.named_by(own.sha256), (self.path.parent / own.file).read_bytes()


def find_recovered(session: Session) -> RecoveredCheckpoint | None:
    """Return what `recover` left in the session's folder; None where it did not write it, and for a model in memory.

    Raises InputError where the weights are not those it wrote, for another TP size than its plan's, and for an object
    in memory that was loaded from such a folder.
    """
    if session.source is None:
        where = Path(session.ref.id)
        if (where / REPORT_FILE).is_file():
            raise InputError(
                f"The model in memory was loaded from {where}, which `recover` wrote: what it drops, and what it was "
                "fitted on, lies there; give the folder in place of the object."
            )
        return None
    folder = session.source.folder
    path = folder / "plan.json"
    is_plan = path.is_file() and b'"spd-calib/plan"' in path.read_bytes()
    plan = read(Plan, path) if is_plan else None
    if plan is None or plan.recovered_from is None:
        if (folder / REPORT_FILE).is_file():
            raise InputError(
                f"{folder} was written by `recover`, and its plan.json, which says what it drops, is gone; "
                f"put it back, or remove {REPORT_FILE} to take the folder for a dense model."
            )
        return None
    if not plan.drops:  # with every block given back it is the dense model
        return None
    check_same_model(plan.model, session.ref)
    ranks = plan.tensor_parallel.size
    if ranks != session.tp:
        raise InputError(f"{folder} was recovered for {ranks} ranks, not for {session.tp}; give `tp` {ranks}.")
    return RecoveredCheckpoint(plan, path)


def lengths_of_then(recovered: RecoveredCheckpoint, selection: TextSelection) -> TextSelection:
    """Return the selection; where it says nothing of lengths and column, with those that the recovery verified on."""
    if (selection.seq_len, selection.min_len, selection.pack, selection.column) != (None, None, False, TEXT):
        return selection
    text = recovered.plan.verified.text
    return replace(selection, seq_len=text.seq_len, min_len=text.min_len, pack=text.pack, column=text.column)


def open_profiled(
    profile: Profile,
    *,
    path: Path | None = None,
    model: Model | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[Session, RecoveredCheckpoint | None]:
    """Return the model that a profile is of, and what `recover` left in its folder, where that was profiled.

    The arguments are those of opening.open_model_of; `model` may also be a quantised copy of the one profiled. Raises
    InputError where it is no longer the one profiled.
    """
    if profile.recovered is None and model is not None:
        session = open_model(model, tp=profile.tensor_parallel.size, tokenizer=tokenizer)
        if not is_quantised_copy(session, of=profile.model):
            check_same_model(profile.model, session.ref)
        return session, None
    session = open_model_of(profile, path=path, model=model, tokenizer=tokenizer)
    if profile.recovered is None:
        return session, None
    recovered = find_recovered(session)
    if recovered is None or recovered.sha256 != profile.recovered.plan_sha256:
        where = session.source.folder if session.source else "The model in memory"
        raise InputError(f"{where} has another plan.json than when it was profiled; profile again.")
    return session, recovered


def load_original(plan: Plan, run: RunOptions, *, path: Path | None = None) -> TensorParallelLM:
    """Return the dense model that a recovered checkpoint was made from, on as many ranks; `path` is the plan's file."""
    assert plan.recovered_from is not None
    ref = plan.recovered_from
    session = open_model(named_by(ref, path), tp=plan.tensor_parallel.size, expected=ref)
    return session.load(run.device, str(run.dtype), seed=run.seed, stream=run.stream)
