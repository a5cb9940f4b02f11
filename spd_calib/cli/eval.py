"""spd-calib eval: the planned model against the dense one on lm-eval tasks."""

from pathlib import Path
from typing import Annotated

import typer

from .options import COMMON, Device, Dtype, Json, ModelPlace, Recipe

PROMPT = "Under lm-eval's names, with its defaults"
Text = str | None


def register(app: typer.Typer) -> None:
    app.command(
        "eval",
        epilog="Example: spd-calib eval plan.json --tasks arc_easy,hellaswag -o results.json",
        context_settings={"token_normalize_func": dashed},
    )(evaluate)


def dashed(option: str) -> str:
    """Return an option as this tool spells it: lm-eval's own spelling, --num_fewshot, is understood, too."""
    return option.replace("_", "-")


def evaluate(
    plan: Annotated[Path, typer.Argument(help="Written by spd-calib plan.")],
    *,
    tasks: Annotated[str, typer.Option(help="lm-eval tasks, comma-separated; 'demo' for the three shipped ones.")],
    output: Annotated[Path, typer.Option("--output", "-o")] = Path("results.json"),
    include_path: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder with further lm-eval tasks.")] = None,
    limit: Annotated[Text, typer.Option(metavar="N", help="Documents a task; below 1, a share of them.")] = None,
    samples: Annotated[Text, typer.Option(metavar="JSON", help='Or those named: {"task": [0, 7]}.')] = None,
    log_samples: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Folder or .jsonl for what both say of each document.")
    ] = None,
    max_batch_size: Annotated[int, typer.Option(min=1, help="With --batch-size auto.")] = 64,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples shown [as each task says].", rich_help_panel=PROMPT)
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="The tokenizer's.", rich_help_panel=PROMPT)
    ] = False,
    fewshot_as_multiturn: Annotated[
        Text, typer.Option(metavar="BOOL", help="Examples as turns [with a chat template].", rich_help_panel=PROMPT)
    ] = None,
    system_instruction: Annotated[
        Text, typer.Option(metavar="TEXT", help="Before the task's own.", rich_help_panel=PROMPT)
    ] = None,
    gen_kwargs: Annotated[
        Text, typer.Option(metavar="K=V,...", help="Over each task's own.", rich_help_panel=PROMPT)
    ] = None,
    model_args: Annotated[
        Text, typer.Option(metavar="K=V,...", help="Say enable_thinking=false.", rich_help_panel=PROMPT)
    ] = None,
    metadata: Annotated[
        Text, typer.Option(metavar="K=V,...", help="For tasks that ask for it.", rich_help_panel=PROMPT)
    ] = None,
    seed: Annotated[
        str, typer.Option(metavar="N", help="Four, or one for all.", rich_help_panel=PROMPT)
    ] = "0,1234,1234,1234",
    batch_size: Annotated[str, typer.Option(metavar="N|auto", help="requests a time", rich_help_panel=COMMON)] = "8",
    model: ModelPlace = None,
    device: Device = "auto",
    dtype: Dtype = None,
    json: Json = False,
    recipe: Recipe = None,
) -> None:
    """Run lm-eval on the dense and the planned model: both scores, the paired difference and its error.

    A killed run goes on when given again.
    """
    from spd_calib.api.evaluate import evaluate as run_tasks
    from spd_calib.api.options import RunOptions
    from spd_calib.api.tasks import TaskOptions
    from spd_calib.errors import InputError
    from spd_calib.evaluation import options as parse
    from spd_calib.formats.files import check_writable, dumps, write_text
    from spd_calib.ranks import is_main_rank
    from spd_calib.reporting import tables

    from .terminal import print_json, say, table, working

    if output.suffix == ".jsonl":  # it could be one that `log_samples` writes
        raise InputError(f"{output} would be a log of documents, not the results; name a file that ends in .json.")
    check_writable({"results": output})
    options = parse.EvalOptions(
        limit=parse.parse_limit(limit),
        samples=parse.parse_samples(samples),
        num_fewshot=num_fewshot,
        apply_chat_template=apply_chat_template,
        fewshot_as_multiturn=parse.parse_bool(fewshot_as_multiturn, "fewshot_as_multiturn"),
        system_instruction=system_instruction,
        gen_kwargs=parse.parse_arguments(gen_kwargs, "generation arguments"),
        model_args=parse.parse_arguments(model_args, "model arguments"),
        metadata=parse.parse_arguments(metadata, "metadata"),
        seeds=parse.parse_seeds(seed),
        batch_size=parse.parse_batch_size(batch_size),
        max_batch_size=max_batch_size,
    )
    journal = output.with_name(output.name + ".journal")
    with working("lm-eval") as work:
        results = run_tasks(
            plan,
            tasks=TaskOptions.of(tasks, include_path, options=options),
            model=model,
            journal=journal,
            log_samples=log_samples,
            run=RunOptions(device, dtype),
            progress=work.progress,
        )
    write_text(output, dumps(results))
    if is_main_rank():
        journal.unlink(missing_ok=True)
    table(*tables.tasks(results))
    say(f"written: {output}")
    if json:
        print_json(dumps(results))
