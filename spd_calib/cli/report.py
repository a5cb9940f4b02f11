"""spd-calib report: what a run measured, planned and verified, as one page and as a figure."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Json, Recipe


def register(app: typer.Typer) -> None:
    app.command("report", epilog="Example: spd-calib report . -o report.html --png sensitivity.png")(report)


def report(
    run: Annotated[Path, typer.Argument(help="Folder with profile.json and what was made from it, or a profile.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The page, one HTML file.")] = None,
    png: Annotated[Path | None, typer.Option(help="The sensitivity figure alone.")] = None,
    plan: Annotated[Path | None, typer.Option(help="The plan made from the profile [plan.json in RUN].")] = None,
    json: Json = False,
    recipe: Recipe = None,
) -> None:
    """Show a run: sensitivity by block, the plan, its front, evaluation and latency, as a page that loads nothing."""
    from functools import partial
    from json import dumps

    from spd_calib.errors import InputError
    from spd_calib.formats.files import check_writable, write_bytes, write_text
    from spd_calib.report import draw, figures
    from spd_calib.report.page import page, sections
    from spd_calib.report.run import find

    from .terminal import print_json, say

    if output is None and png is None:
        raise InputError("Nothing is asked for: give -o report.html for the page, --png for the figure, or both.")
    found = find(run, plan)
    for path in (output, png):
        if path:
            check_writable(path)
    left_out = []
    if output:
        shown = sections(found)
        left_out = [s.name for s in shown if s.left_out]
        write_text(output, page(found, shown))
        for s in shown:
            if s.left_out:
                say(f"{s.heading}: {s.said[0][0].lower()}{s.said[0][1:]}")
        say(f"written: {output}")
    if png:
        write_bytes(png, draw.png(partial(figures.sensitivity, found.profile, found.plan, title=True)))
        say(f"written: {png}")
    if json:
        written = [str(path) for path in (output, png) if path]
        print_json(dumps({"written": written, "left_out": left_out}, indent=1) + "\n")
