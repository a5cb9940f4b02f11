"""spd-calib report: a profile, and the plan made from it, as a figure."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Recipe


def register(app: typer.Typer) -> None:
    app.command("report", epilog="Example: spd-calib report profile.json --plan plan.json --png sensitivity.png")(
        report
    )


def report(
    profile: Annotated[Path, typer.Argument(help="Written by spd-calib profile.")],
    png: Annotated[Path, typer.Option(help="The figure to write.")],
    plan: Annotated[Path | None, typer.Option(help="The plan made from it: colours the blocks.")] = None,
    recipe: Recipe = None,
) -> None:
    """Draw the sensitivity of every block with its error bar, one colour a strategy."""
    from spd_calib.formats.files import check_writable, read
    from spd_calib.formats.plan import Plan
    from spd_calib.formats.profile import Profile
    from spd_calib.report.figures import sensitivity_figure

    from .terminal import say

    measured = read(Profile, profile)
    planned = read(Plan, plan) if plan else None
    check_writable(png)
    sensitivity_figure(measured, planned, png)
    say(f"written: {png}")
