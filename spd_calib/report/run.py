"""What lies in the folder of a run: a profile, and what was made from it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel

from spd_calib.errors import InputError
from spd_calib.formats.common import ModelRef, TextRef
from spd_calib.formats.files import FORMATS, F, read, sha256_of
from spd_calib.formats.front import Front
from spd_calib.formats.hardware import Hardware
from spd_calib.formats.plan import Plan, Verified
from spd_calib.formats.profile import Profile
from spd_calib.formats.results import Results


@dataclass(frozen=True)
class Run:
    """`front` is made from the profile where no file holds it. `stale`: by part, why its file is left out."""

    profile: Profile
    plan: Plan | None
    results: Results | None
    front: Front
    hardware: Hardware | None
    stale: dict[str, str] = field(default_factory=dict)

    @property
    def files(self) -> dict[str, BaseModel]:
        """The files that were read, by name."""
        parts = {name: getattr(self, name) for name in FORMATS}
        made = self.front.provenance == self.profile.provenance
        return {f"{name}.json": part for name, part in parts.items() if part and not (name == "front" and made)}


def find(place: Path, plan: Path | None) -> Run:
    """Of a folder, or of a profile alone; `plan` where it is another than the folder's.

    Raises InputError where there is no profile, or the plan was not made from it. Other files that are of another
    model or plan are left out, and `stale` says so.
    """
    from spd_calib.planning.front import front_of

    folder = place if place.is_dir() else None
    profile = read(Profile, place / "profile.json" if folder else place)
    plan = plan or _path(folder, "plan")
    planned = read(Plan, plan) if plan else None
    if planned and plan:
        _check_made_from(planned, plan, profile, place)
    results, front, hardware = _there(Results, folder), _there(Front, folder), _there(Hardware, folder)
    stale = {}
    if results and (plan is None or results.plan_sha256 != sha256_of(plan)):
        results, stale["results"] = None, "results.json is there, but of another plan."
    models = [profile.model, *([planned.model] if planned else [])]
    if front and not _of_one_of(front, models, profile):
        front, stale["front"] = None, "front.json is there, but of another model."
    if hardware and not _of_one_of(hardware, models, profile):
        hardware, stale["hardware"] = None, "hardware.json is there, but of another model."
    return Run(profile, planned, results, front or front_of(profile, None, profile.provenance, {}), hardware, stale)


def _path(folder: Path | None, name: str) -> Path | None:
    return folder / f"{name}.json" if folder and (folder / f"{name}.json").exists() else None


def _there(kind: type[F], folder: Path | None) -> F | None:
    path = _path(folder, kind.__name__.lower())
    return read(kind, path) if path else None


def _check_made_from(plan: Plan, path: Path, profile: Profile, place: Path) -> None:
    """A recovered plan may stand beside the profile of the model that it was recovered from."""
    if not any(_same(profile.model, ref) for ref in (plan.model, plan.recovered_from) if ref):
        raise InputError(f"{path} is a plan of another model than {place} is a profile of; name the plan made from it.")
    ranks = plan.tensor_parallel.size, profile.tensor_parallel.size
    if ranks[0] != ranks[1]:
        raise InputError(f"{path} is a plan for {ranks[0]} ranks, {place} a profile for {ranks[1]}; plan anew.")
    if plan.model == profile.model and not _verifies(plan.verified, profile.verify_text):
        raise InputError(f"{path} was made from another profile than {place}; plan anew, or name the right one.")


def _verifies(verified: Verified, kept: TextRef) -> bool:
    """Was the text that which a profile keeps for verifying, or, of a repaired plan, a lot behind it?"""

    def place(text: TextRef, lots: int) -> tuple:
        return text.source, text.seq_len, text.min_len, text.pack, text.sequences, text.first + lots * text.sequences

    if verified.lot == 0:
        return verified.text == kept
    return [place(t, 0) for t in verified.text.each] == [place(t, verified.lot) for t in kept.each]


def _same(a: ModelRef, b: ModelRef) -> bool:
    return (a.config_hash, a.weight_fingerprint) == (b.config_hash, b.weight_fingerprint)


def _of_one_of(found: Front | Hardware, models: Sequence[ModelRef], profile: Profile) -> bool:
    return any(_same(found.model, ref) for ref in models) and found.tensor_parallel == profile.tensor_parallel
