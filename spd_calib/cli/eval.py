"""spd-calib eval: the planned model against the dense one on lm-eval tasks."""

from pathlib import Path
from typing import Annotated

import typer

from .options import BatchSize, Device, Dtype, Json, Recipe


def register(app: typer.Typer) -> None:
    app.command("eval", epilog="Example: spd-calib eval plan.json --tasks arc_easy,hellaswag -o results.json")(evaluate)


def evaluate(
    plan: Annotated[Path, typer.Argument(help="Written by spd-calib plan.")],
    tasks: Annotated[str, typer.Option(help="lm-eval tasks, comma-separated; 'demo' for the three shipped ones.")],
    output: Annotated[Path, typer.Option("--output", "-o")] = Path("results.json"),
    include_path: Annotated[Path | None, typer.Option(help="Folder with further lm-eval tasks.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents a task.")] = None,
    batch_size: BatchSize = 8,
    device: Device = "auto",
    dtype: Dtype = None,
    json: Json = False,
    recipe: Recipe = None,
) -> None:
    """Run lm-eval on the dense and the planned model: both scores, the paired difference and its error."""
    from spd_calib.evaluation.harness import TaskSuite
    from spd_calib.formats.common import TensorParallel
    from spd_calib.formats.files import check_writable, dumps, read, sha256_of, write_text
    from spd_calib.formats.plan import Plan
    from spd_calib.formats.results import Results
    from spd_calib.parallel.compensation import load_compensation
    from spd_calib.parallel.session import open_session
    from spd_calib.report import tables

    from .options import check_dtype, provenance, resolve_device, resolve_model
    from .recovered import load_original
    from .shared import resolve_tasks
    from .terminal import print_json, say, table, working

    planned = read(Plan, plan)
    check_writable(output)
    made = planned.provenance
    device, dtype = resolve_device(device), check_dtype(dtype or made.dtype)
    session = open_session(resolve_model(planned.model.id), planned.tensor_parallel.size, planned.model)
    suite = TaskSuite(*resolve_tasks(tasks, include_path), limit, made.seed)
    compensation = load_compensation(planned, plan)
    lm = session.load(device, dtype, made.seed)
    lm.set_compensation(compensation)
    original = load_original(planned, device, dtype, made.seed) if planned.recovered_from else None
    with working("lm-eval", 2 * suite.requests) as work:
        results = suite.evaluate(lm, session.tokenizer, planned, batch_size, work.step, original)
    if suite.truncated:
        say("some requests were longer than the model reads: their beginnings were cut off")
    document = Results(
        model=planned.model,
        tensor_parallel=TensorParallel(size=planned.tensor_parallel.size),
        plan_sha256=sha256_of(plan),
        dropped=planned.dropped,
        limit=limit,
        tasks=results,
        provenance=provenance(made.seed, device, dtype),
    )
    write_text(output, dumps(document))
    table(*tables.tasks(document))
    say(f"written: {output}")
    if json:
        print_json(dumps(document))
