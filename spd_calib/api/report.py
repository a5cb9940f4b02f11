"""The report of a run, what it measured, planned and verified: one page, and a figure."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from spd_calib.errors import InputError
from spd_calib.formats.hardware import Hardware
from spd_calib.formats.pareto import Pareto
from spd_calib.formats.plan import Plan
from spd_calib.formats.profile import Profile
from spd_calib.formats.results import Results
from spd_calib.reporting import draw, figures
from spd_calib.reporting.page import Section, page, sections
from spd_calib.reporting.run import Run, find, run_of


@dataclass(frozen=True)
class RunReport:
    """The page of a run, section by section."""

    run: Run
    sections: Sequence[Section]

    @property
    def html(self) -> str:
        """Return the page: one HTML file that loads nothing. The same documents give the same text."""
        return page(self.run, self.sections)

    @property
    def left_out(self) -> list[Section]:
        """Return the sections that have nothing to show, and say what would."""
        return [s for s in self.sections if s.left_out]

    def png(self) -> bytes:
        """Return the figure of every block's sensitivity, with what the plan does, as a PNG."""
        return draw.png(partial(figures.sensitivity, self.run.profile, self.run.plan, title=True))


def report(
    run: Profile | Path | str,
    *,
    plan: Plan | Path | str | None = None,
    results: Results | None = None,
    pareto: Pareto | None = None,
    hardware: Hardware | None = None,
) -> RunReport:
    """Return the report of a run: a folder with profile.json and what was made from it, a profile's file, or a profile.

    `plan` is the plan made from the profile, by default the folder's plan.json. The further documents go with a profile
    given as such; those of another model or plan are left out, and the page says so. Raises InputError where there is
    no profile, or the plan was not made from it.
    """
    if isinstance(run, Profile):
        if plan is not None and not isinstance(plan, Plan):
            raise InputError("A profile given as such goes with a `plan` given as such, not with a file.")
        found = run_of(run, plan=plan, results=results, pareto=pareto, hardware=hardware)
    else:
        if isinstance(plan, Plan) or results or pareto or hardware:
            raise InputError("A run's folder or file goes with files; give the profile as such, too.")
        found = find(Path(run), Path(plan) if plan is not None else None)
    return RunReport(found, sections(found))
