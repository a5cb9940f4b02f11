"""spd-calib eval: the planned model against the dense one on lm-eval tasks."""

from pathlib import Path
from typing import Annotated

import typer

from .options import BatchSize, Device, Dtype, Json, ModelPlace, Recipe


def register(app: typer.Typer) -> None:
    app.command("eval", epilog="Example: spd-calib eval plan.json --tasks arc_easy,hellaswag -o results.json")(evaluate)


def evaluate(
    plan: Annotated[Path, typer.Argument(help="Written by spd-calib plan.")],
    tasks: Annotated[str, typer.Option(help="lm-eval tasks, comma-separated; 'demo' for the three shipped ones.")],
    output: Annotated[Path, typer.Option("--output", "-o")] = Path("results.json"),
    include_path: Annotated[Path | None, typer.Option(help="Folder with further lm-eval tasks.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents a task.")] = None,
    model: ModelPlace = None,
    batch_size: BatchSize = 8,
    device: Device = "auto",
    dtype: Dtype = None,
    json: Json = False,
    recipe: Recipe = None,
) -> None:
    """Run lm-eval on the dense and the planned model: both scores, the paired difference and its error."""
    from spd_calib.api.evaluate import evaluate as run_tasks
    from spd_calib.api.options import RunOptions
    from spd_calib.api.tasks import TaskOptions
    from spd_calib.formats.files import check_writable, dumps, write_text
    from spd_calib.reporting import tables

    from .terminal import print_json, say, table, working

    check_writable(output)
    with working("lm-eval") as work:
        results = run_tasks(
            plan,
            tasks=TaskOptions.of(tasks, include_path, limit),
            model=model,
            run=RunOptions(device, dtype, batch_size),
            progress=work.progress,
        )
    write_text(output, dumps(results))
    table(*tables.tasks(results))
    say(f"written: {output}")
    if json:
        print_json(dumps(results))
