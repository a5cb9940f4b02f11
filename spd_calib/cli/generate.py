"""spd-calib generate: read what a plan does to text."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Device, Dtype, Json, Recipe, Seed


def register(app: typer.Typer) -> None:
    app.command("generate", epilog='Example: spd-calib generate plan.json --prompt "Once upon a time"')(generate)


def generate(
    plan: Annotated[Path, typer.Argument(help="Written by spd-calib plan.")],
    prompt: Annotated[list[str], typer.Option(help="Text to go on from; repeatable.")],
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens written, at most.")] = 64,
    sample: Annotated[bool, typer.Option("--sample", help="Draw tokens at random, rather than the likeliest.")] = False,
    temperature: Annotated[float, typer.Option(min=1e-3, help="With --sample.")] = 1.0,
    seed: Seed = 0,
    dense: Annotated[bool, typer.Option("--dense", help="The dense model's text, too.")] = False,
    device: Device = "auto",
    dtype: Dtype = None,
    json: Json = False,
    recipe: Recipe = None,
) -> None:
    """Continue prompts with the planned model, on simulated ranks or, under torchrun, on real ones."""
    from json import dumps

    from spd_calib.errors import InputError
    from spd_calib.formats.files import read
    from spd_calib.formats.plan import Plan
    from spd_calib.parallel.compensation import load_compensation
    from spd_calib.parallel.generate import continue_text
    from spd_calib.parallel.session import open_session

    from .options import check_dtype, resolve_device, resolve_model
    from .terminal import print_json, say, working

    planned = read(Plan, plan)
    device, dtype = resolve_device(device), check_dtype(dtype or planned.provenance.dtype)
    session = open_session(resolve_model(planned.model.id), planned.tensor_parallel.size, planned.model)
    for text in prompt:
        length = len(session.tokenizer(text)["input_ids"])
        if not length:
            raise InputError("A prompt holds no token; give --prompt some words.")
        if length + new_tokens > session.max_length:
            raise InputError(
                f"A prompt of {length} tokens and --new-tokens {new_tokens} are beyond the model's "
                f"{session.max_length}; lower one of them."
            )
    compensation = load_compensation(planned, plan)
    lm = session.load(device, dtype, seed)
    models = ("dense", "plan") if dense else ("plan",)
    written = []
    with working("generate", len(models) * len(prompt)) as work:
        for name in models:
            if name == "plan":
                lm.set_strategies(planned.strategies, planned.mlp_strategies)
                lm.set_compensation(compensation)
            for text in prompt:
                found = continue_text(lm, session.tokenizer, text, new_tokens, temperature if sample else 0, seed)
                written.append({"model": name, "prompt": text, "text": found})
                work.step()
    if json:
        print_json(dumps(written, indent=1) + "\n")
        return
    for row in written:
        if dense:
            say(f"{row['model']}:")
        print_json(row["text"] + "\n")
