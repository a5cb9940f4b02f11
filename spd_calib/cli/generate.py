"""spd-calib generate: read what a plan does to text."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Device, Dtype, Json, ModelPlace, Recipe, Seed


def register(app: typer.Typer) -> None:
    app.command("generate", epilog='Example: spd-calib generate plan.json --prompt "Once upon a time"')(generate)


def generate(
    plan: Annotated[Path, typer.Argument(help="Written by spd-calib plan.")],
    *,
    prompt: Annotated[list[str], typer.Option(help="Text to go on from; repeatable.")],
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens written, at most.")] = 64,
    sample: Annotated[bool, typer.Option("--sample", help="Draw tokens at random, rather than the likeliest.")] = False,
    temperature: Annotated[float, typer.Option(min=1e-3, help="With --sample.")] = 1.0,
    seed: Seed = 0,
    dense: Annotated[bool, typer.Option("--dense", help="The dense model's text, too.")] = False,
    model: ModelPlace = None,
    device: Device = "auto",
    dtype: Dtype = None,
    json: Json = False,
    recipe: Recipe = None,
) -> None:
    """Continue prompts with the planned model, on simulated ranks or, under torchrun, on real ones."""
    from dataclasses import asdict
    from json import dumps

    from spd_calib.api import generate as api
    from spd_calib.api.options import RunOptions

    from .terminal import print_json, say, working

    with working("generate") as work:
        written = api.generate(
            plan,
            prompt,
            model=model,
            new_tokens=new_tokens,
            temperature=temperature if sample else 0.0,
            dense=dense,
            run=RunOptions(device=device, dtype=dtype, seed=seed),
            progress=work.progress,
        )
    if json:
        print_json(dumps([asdict(row) for row in written], indent=1) + "\n")
        return
    for row in written:
        if dense:
            say(f"{row.model}:")
        print_json(row.text + "\n")
