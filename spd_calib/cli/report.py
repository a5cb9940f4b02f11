"""spd-calib report: what a run measured, planned and verified, as one page and as a figure."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Json, Recipe


def register(app: typer.Typer) -> None:
    app.command("report", epilog="Example: spd-calib report . -o report.html --png sensitivity.png")(report)


def report(
    run: Annotated[Path, typer.Argument(help="Folder with profile.json and what was made from it, or a profile.")],
    *,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The page, one HTML file.")] = None,
    png: Annotated[Path | None, typer.Option(help="The sensitivity figure alone.")] = None,
    plan: Annotated[Path | None, typer.Option(help="The plan made from the profile [plan.json in RUN].")] = None,
    json: Json = False,
    recipe: Recipe = None,
) -> None:
    """Show a run as a page that loads nothing: the plan, sensitivity, Pareto front, evaluation, latency."""
    from json import dumps

    from spd_calib.api.report import report as make
    from spd_calib.errors import InputError
    from spd_calib.formats.files import check_writable, write_bytes, write_text

    from .terminal import print_json, say

    written = [path for path in (output, png) if path]
    if not written:
        raise InputError("Nothing is asked for: give -o report.html for the page, --png for the figure, or both.")
    made = make(run, plan=plan)
    check_writable({"page": output, "figure": png})
    left_out = made.left_out if output else []
    if output:
        write_text(output, made.html)
        for section in left_out:
            say(f"{section.heading}: {section.said[0][0].lower()}{section.said[0][1:]}")
        say(f"written: {output}")
    if png:
        write_bytes(png, made.png())
        say(f"written: {png}")
    if json:
        print_json(
            dumps({"written": [str(path) for path in written], "left_out": [s.name for s in left_out]}, indent=1) + "\n"
        )
