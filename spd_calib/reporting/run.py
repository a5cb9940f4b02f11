"""The documents of a run: a profile, and what was made from it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel

from spd_calib.errors import InputError
from spd_calib.formats.common import ModelRef, TextRef
from spd_calib.formats.files import F, read, sha256_as_written, sha256_of
from spd_calib.formats.hardware import Hardware
from spd_calib.formats.pareto import Pareto
from spd_calib.formats.plan import Plan, Verified
from spd_calib.formats.profile import Profile
from spd_calib.formats.results import Results
from spd_calib.planning.pareto import pareto_of


@dataclass(frozen=True)
class Run:
    """`pareto` is made from the profile where none was given. `stale`: by part, why what was given is left out."""

    profile: Profile
    plan: Plan | None
    results: Results | None
    pareto: Pareto
    hardware: Hardware | None
    stale: dict[str, str] = field(default_factory=dict)

    @property
    def files(self) -> dict[str, BaseModel]:
        """Return the documents that were given, by the names of their files."""
        parts = {name: getattr(self, name) for name in ("profile", "plan", "results", "hardware", "pareto")}
        made = self.pareto.provenance == self.profile.provenance
        return {f"{name}.json": part for name, part in parts.items() if part and not (name == "pareto" and made)}


def find(place: Path, plan: Path | None) -> Run:
    """Return the run in a folder, or that of a profile's file alone; `plan` where it is another than the folder's.

    Raises InputError where there is no profile, and as run_of does.
    """
    folder = place if place.is_dir() else None
    profile = read(Profile, place / "profile.json" if folder else place)
    plan = plan or _path(folder, "plan")
    return run_of(
        profile,
        plan=read(Plan, plan) if plan else None,
        plan_sha256=sha256_of(plan) if plan else None,
        results=_there(Results, folder),
        pareto=_there(Pareto, folder),
        hardware=_there(Hardware, folder),
        names=(str(place), str(plan)),
    )


def run_of(
    profile: Profile,
    *,
    plan: Plan | None = None,
    plan_sha256: str | None = None,
    results: Results | None = None,
    pareto: Pareto | None = None,
    hardware: Hardware | None = None,
    names: tuple[str, str] = ("the profile", "the plan"),
) -> Run:
    """Return the run that these documents are of; `plan_sha256` is that of the plan's file, where it comes from one.

    What is of another model or plan is left out, and `stale` says so. Raises InputError, with the `names` of profile
    and plan, where the plan was not made from the profile.
    """
    if plan is not None:
        _check_made_from(plan, profile, names=names)
        plan_sha256 = plan_sha256 or sha256_as_written(plan)
    stale = {}
    if results and results.plan_sha256 != plan_sha256:
        results, stale["results"] = None, "results.json is there, but of another plan."
    models = [profile.model, *([plan.model] if plan else [])]
    if pareto and not _of_one_of(pareto, models, profile=profile):
        pareto, stale["pareto"] = None, "pareto.json is there, but of another model."
    if hardware and not _of_one_of(hardware, models, profile=profile):
        hardware, stale["hardware"] = None, "hardware.json is there, but of another model."
    made = pareto or pareto_of(profile, provenance=profile.provenance)
    return Run(profile, plan, results, made, hardware, stale)


def _path(folder: Path | None, name: str) -> Path | None:
    return folder / f"{name}.json" if folder and (folder / f"{name}.json").exists() else None


def _there(kind: type[F], folder: Path | None) -> F | None:
    path = _path(folder, kind.__name__.lower())
    return read(kind, path) if path else None


def _check_made_from(plan: Plan, profile: Profile, *, names: tuple[str, str]) -> None:
    """Raise InputError unless the plan was made from the profile.

    A recovered plan may stand beside the profile of the model that it was recovered from, and the plan of a quantised
    copy beside that of the original.
    """
    of_profile, of_plan = names
    if not any(_same(profile.model, ref) for ref in (plan.model, plan.recovered_from, plan.profiled) if ref):
        raise InputError(
            f"{of_plan} is a plan of another model than {of_profile} is a profile of; name the plan made from it."
        )
    ranks = plan.tensor_parallel.size, profile.tensor_parallel.size
    if ranks[0] != ranks[1]:
        raise InputError(f"{of_plan} is a plan for {ranks[0]} ranks, {of_profile} a profile for {ranks[1]}; plan anew.")
    if plan.model == profile.model and not _verifies(plan.verified, profile.verify_text):
        raise InputError(
            f"{of_plan} was made from another profile than {of_profile}; plan anew, or name the right one."
        )


def _verifies(verified: Verified, kept: TextRef) -> bool:
    """Say whether the text is the one that a profile keeps for verifying, or, of a repaired plan, a round behind it."""

    def place(text: TextRef, rounds: int) -> tuple:
        first = text.first + rounds * text.sequences
        return text.source, text.column, text.seq_len, text.min_len, text.pack, text.sequences, first

    if verified.round == 0:
        return verified.text == kept
    return [place(t, 0) for t in verified.text.each] == [place(t, verified.round) for t in kept.each]


def _same(a: ModelRef, b: ModelRef) -> bool:
    return (a.config_hash, a.weight_fingerprint) == (b.config_hash, b.weight_fingerprint)


def _of_one_of(found: Pareto | Hardware, models: Sequence[ModelRef], *, profile: Profile) -> bool:
    return any(_same(found.model, ref) for ref in models) and found.tensor_parallel == profile.tensor_parallel
