"""spd-calib check: is a plan valid, does it fit the model, is it fresh, and does a runtime really run it?"""

from pathlib import Path
from typing import Annotated

import typer

from .options import COMMON, Device, Recipe

PROMPTS = [
    "One day Mia and Tom meet in the park. Mia has a red ball.",
    "The ranks of a tensor-parallel model each hold their own heads, and",
    "def mean(values):\n    return",
]


def register(app: typer.Typer) -> None:
    app.command("check", epilog="Example: spd-calib check plan.json --runtime torchrun")(check)


def check(
    plan: Annotated[Path, typer.Argument(help="Written by spd-calib plan or recover.")],
    runtime: Annotated[
        str | None, typer.Option(help="torchrun or vllm: start it, and compare it with the simulation.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Run this there; repeatable [three short ones].")] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens generated after each prompt.")] = 16,
    device: Device = "auto",
    json: Annotated[bool, typer.Option("--json", help="the rows on stdout", rich_help_panel=COMMON)] = False,
    recipe: Recipe = None,
) -> None:
    """Check a plan against its schema, its model's form and weights and, with --runtime, against real ranks."""
    from dataclasses import asdict
    from json import dumps

    from spd_calib.errors import InputError, SpdError
    from spd_calib.formats.files import read
    from spd_calib.formats.plan import Plan
    from spd_calib.runtimes.checks import Row

    from .options import resolve_device, resolve_model
    from .terminal import print_json, table, working

    if runtime not in (None, "torchrun", "vllm"):
        raise InputError(f"--runtime {runtime!r} is neither torchrun nor vllm.")
    planned = read(Plan, plan)
    rows = _static(planned, plan, resolve_model(planned.model.id))
    prompts = prompt or PROMPTS
    if runtime == "torchrun":
        from spd_calib.runtimes.torchrun.check import run as on_torchrun

        with working(f"check on {planned.tensor_parallel.size} ranks"):
            rows += on_torchrun(plan, prompts, resolve_model(planned.model.id), new_tokens, resolve_device(device))
    elif runtime == "vllm":
        from spd_calib.runtimes.vllm.check import run as on_vllm

        with working(f"check on vLLM, {planned.tensor_parallel.size} ranks"):
            rows += on_vllm(plan, prompts, resolve_model(planned.model.id), new_tokens)
    columns = ["check", "expected", "found", ""]
    found: list[Row] = rows
    table(str(plan), columns, [[r.what, r.expected, r.found, "ok" if r.ok else "NO"] for r in found], left=3)
    if json:
        print_json(dumps([asdict(r) for r in found], indent=1) + "\n")
    if wrong := [r for r in found if not r.ok]:
        raise SpdError(f"{plan} does not hold: {wrong[0].what}: expected {wrong[0].expected}, found {wrong[0].found}.")


def _static(planned, path: Path, model: str) -> list:
    """Schema (read already), weights, form and TP size. Raises SpdError where the plan is of another model."""
    from spd_calib.errors import SpdError
    from spd_calib.models.load import check_config, locate, model_ref, read_config
    from spd_calib.parallel.compensation import load_compensation
    from spd_calib.parallel.session import check_same_model
    from spd_calib.runtimes.checks import Row

    source = locate(model, planned.model.revision)
    config = read_config(source)
    try:
        check_same_model(planned.model, model_ref(source, config))
    except SpdError as e:
        e.exit_code = 1  # here the question itself was whether they fit
        raise
    check_config(config, planned.tensor_parallel.size)
    load_compensation(planned, path)
    blocks, tp = planned.model.num_blocks, planned.tensor_parallel.size
    dropped = len(planned.dropped) + len(planned.mlp_dropped)
    return [
        Row("the file", "a valid plan", f"format {planned.format}, version {planned.version}", True),
        Row("the model", f"{planned.model.architecture}, {blocks} blocks", "the same", True),
        Row("its weights", f"{planned.model.weight_fingerprint[:16]}…", "the same", True),
        Row("TP size", str(tp), "divides heads and neurons", True),
        Row("all-reduces per forward", f"{2 * blocks} dense", f"{2 * blocks - dropped} planned", True),
    ]
