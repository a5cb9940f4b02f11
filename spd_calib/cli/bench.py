"""spd-calib bench: what a sync costs on this machine, and what the plan saves."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from .options import Device, Dtype, Json, ModelPlace, Recipe, arguments


def register(app: typer.Typer) -> None:
    app.command("bench", epilog="Example: spd-calib bench plan.json -o hardware.json")(bench)


def bench(
    plan: Annotated[Path, typer.Argument(help="Written by spd-calib plan.")],
    *,
    runtime: Annotated[
        Literal["torchrun", "vllm"], typer.Option(help="Eager modules, or vLLM as served.")
    ] = "torchrun",
    as_served: Annotated[str, typer.Option(help="With --runtime vllm: arguments of vllm serve, in quotes.")] = "",
    output: Annotated[Path, typer.Option("--output", "-o")] = Path("hardware.json"),
    rounds: Annotated[int, typer.Option(min=1, help="Turns in which everything is measured once.")] = 20,
    batch_size: Annotated[
        list[int] | None, typer.Option(min=1, metavar="N", help="Sequences in a forward; repeatable [1].")
    ] = None,
    tokens: Annotated[
        list[int] | None, typer.Option(min=1, metavar="N", help="Tokens of the prompt; repeatable [128].")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded behind it, each timed.")] = 16,
    model: ModelPlace = None,
    device: Device = "auto",
    dtype: Dtype = None,
    json: Json = False,
    recipe: Recipe = None,
) -> None:
    """Time all-reduces by size, prefill and decode (dense, plan, every block dropped) on real ranks.

    Starts torchrun on this machine at the plan's TP size, or runs under the torchrun that started it; or, with
    --runtime vllm, engines as vllm serve makes them, one after another.
    """
    from spd_calib.api import bench as api
    from spd_calib.api.options import RunOptions
    from spd_calib.formats.files import check_writable, dumps, write_text
    from spd_calib.ranks import is_main_rank
    from spd_calib.reporting import tables

    from .terminal import print_json, say, table, working

    check_writable({"hardware": output})
    settings = api.BenchSettings(
        rounds=rounds, batch_size=tuple(batch_size or [1]), tokens=tuple(tokens or [128]), new_tokens=new_tokens
    )
    with working("bench") as work:
        measured = api.bench(
            plan,
            runtime=runtime,
            model=model,
            as_served=arguments(as_served, "as_served"),
            settings=settings,
            run=RunOptions(device=device, dtype=dtype),
            progress=work.progress,
        )
    if not is_main_rank():
        return
    write_text(output, dumps(measured))
    for found in tables.hardware(measured):
        table(*found)
    say(f"written: {output}")
    if json:
        print_json(dumps(measured))
