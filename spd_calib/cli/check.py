"""spd-calib check: is a plan valid and fresh, and does a runtime really run it?"""

from pathlib import Path
from typing import Annotated

import typer

from .options import COMMON, Device, ModelPlace, Recipe, arguments


def register(app: typer.Typer) -> None:
    app.command("check", epilog="Example: spd-calib check plan.json --runtime torchrun")(check)


def check(
    plan: Annotated[Path, typer.Argument(help="Written by spd-calib plan or recover.")],
    *,
    runtime: Annotated[
        str | None, typer.Option(help="torchrun or vllm: start it, and compare it with the simulation.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Run this there; repeatable [three short ones].")] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens generated after each prompt.")] = 16,
    as_served: Annotated[
        str | None,
        typer.Option(help="With --runtime vllm: arguments of vllm serve, in quotes; judge the very engine they make."),
    ] = None,
    model: ModelPlace = None,
    device: Device = "auto",
    json: Annotated[bool, typer.Option("--json", help="the rows on stdout", rich_help_panel=COMMON)] = False,
    recipe: Recipe = None,
) -> None:
    """Check a plan against its schema, its model's form and weights and, with --runtime, against real ranks."""
    from dataclasses import asdict
    from json import dumps

    from spd_calib.api import check as api
    from spd_calib.api.options import RunOptions
    from spd_calib.errors import SpdError

    from .terminal import print_json, table, working

    with working("check") as work:
        found = api.check(
            plan,
            runtime=runtime,  # type: ignore[arg-type]  # whatever was typed: the call refuses what it does not know
            prompts=prompt or api.PROMPTS,
            new_tokens=new_tokens,
            as_served=None if as_served is None else arguments(as_served, "as_served"),
            model=model,
            run=RunOptions(device=device),
            progress=work.progress,
        )
    rows = [[r.what, r.expected, r.found, "ok" if r.ok else "NO"] for r in found.rows]
    table(str(plan), ["check", "expected", "found", ""], rows, left=3)
    if json:
        print_json(dumps([asdict(r) for r in found.rows], indent=1) + "\n")
    if not found.ok:
        first = found.wrong[0]
        raise SpdError(f"{plan} does not hold: {first.what}: expected {first.expected}, found {first.found}.")
