"""Two profiles or two plans, side by side."""

from pathlib import Path

from spd_calib.errors import InputError
from spd_calib.formats.files import name_of, read
from spd_calib.formats.plan import Plan
from spd_calib.formats.profile import Profile
from spd_calib.reporting.diff import PlanDiff, ProfileDiff, diff_plans, diff_profiles

Compared = Profile | Plan | Path | str


def diff(a: Compared, b: Compared) -> ProfileDiff | PlanDiff:
    """Return what differs between two profiles or two plans, and why; of two texts, whether the data matters.

    Raises InputError for two of different kinds, and for two that cannot be compared.
    """
    first, second = (d if isinstance(d, Profile | Plan) else _read(Path(d)) for d in (a, b))
    if isinstance(first, Profile) and isinstance(second, Profile):
        return diff_profiles(first, second)
    if isinstance(first, Plan) and isinstance(second, Plan):
        return diff_plans(first, second)
    names = [str(given) if isinstance(given, str | Path) else name for given, name in ((a, "A"), (b, "B"))]
    kinds = [type(document).__name__.lower() for document in (first, second)]
    raise InputError(f"{names[0]} is a {kinds[0]} and {names[1]} a {kinds[1]}: compare two profiles or two plans.")


def _read(path: Path) -> Profile | Plan:
    return read(Profile, path) if name_of(path, ("profile", "plan")) == "profile" else read(Plan, path)
