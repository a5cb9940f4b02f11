"""spd-calib profile: what dropping each sync point costs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import COMMON, DTYPES, BatchSize, Device, Json, Recipe, Seed

if TYPE_CHECKING:
    from spd_calib.sensitivity.estimate import Estimate

TEXT, METHOD, RUN = "Text", "What is measured", "How it runs"


def register(app: typer.Typer) -> None:
    app.command(
        "profile", epilog="Example: spd-calib profile meta-llama/Llama-2-7b-hf --tp 8 --data wikitext --pack -o p.json"
    )(profile)


def profile(
    model: Annotated[str, typer.Argument(help="Hub id, local folder, or 'demo'.")],
    *,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel size: the number of ranks.")],
    data: Annotated[
        list[str],
        typer.Option(metavar="TEXT", help="'demo', file, folder, hub set; repeatable."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The profile.")] = Path("profile.json"),
    seq_len: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of a document used [2048, or the model's limit].", rich_help_panel=TEXT),
    ] = None,
    min_len: Annotated[
        int | None, typer.Option(min=2, help="Leave out shorter documents [--seq-len].", rich_help_panel=TEXT)
    ] = None,
    max_samples: Annotated[int, typer.Option(min=1, help="Sequences measured on.", rich_help_panel=TEXT)] = 128,
    verify_samples: Annotated[
        int, typer.Option(min=1, help="Sequences after those, kept for verifying.", rich_help_panel=TEXT)
    ] = 64,
    pack: Annotated[
        bool, typer.Option("--pack", help="Glue documents together, cut them at --seq-len.", rich_help_panel=TEXT)
    ] = False,
    column: Annotated[
        str, typer.Option(metavar="NAME", help="Field with the text, or with chat messages.", rich_help_panel=TEXT)
    ] = "text",
    strategy: Annotated[
        list[str] | None, typer.Option(help="block_drop or plain_drop; repeatable [both].", rich_help_panel=METHOD)
    ] = None,
    sync_points: Annotated[
        str, typer.Option(metavar="KINDS", help="attention, mlp, or both with a comma.", rich_help_panel=METHOD)
    ] = "attention",
    method: Annotated[
        str, typer.Option(help="single, cumulative or fisher (fast).", rich_help_panel=METHOD)
    ] = "single",
    target_stderr: Annotated[
        float | None, typer.Option(help="fisher: relative error of sampling [0.08].", rich_help_panel=METHOD)
    ] = None,
    confidence: Annotated[
        float | None, typer.Option(help="single: stop once a tier is as certain, say 0.95.", rich_help_panel=METHOD)
    ] = None,
    rank_by: Annotated[
        str | None,
        typer.Option(metavar="METRIC", help="accuracy, kl or ppl [accuracy; fisher: kl].", rich_help_panel=METHOD),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES", help="Rank by accuracy on lm-eval tasks, comma-separated.", rich_help_panel=METHOD
        ),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder with further lm-eval tasks.", rich_help_panel=METHOD)
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents a task.", rich_help_panel=METHOD)] = None,
    batch_size: BatchSize = 8,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(metavar="|".join(DTYPES), rich_help_panel=COMMON)] = "float32",
    stream: Annotated[
        bool, typer.Option("--stream", help="Read each block from disk when it runs.", rich_help_panel=RUN)
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what would be run, how long and in how much memory.", rich_help_panel=RUN),
    ] = False,
    json: Json = False,
    recipe: Recipe = None,
) -> None:
    """Measure what dropping each block's sync points costs, and rank the blocks."""
    from dataclasses import asdict
    from json import dumps as json_of

    from spd_calib.api.estimate import estimate_profile
    from spd_calib.api.options import RunOptions
    from spd_calib.api.profile import profile as measure
    from spd_calib.api.tasks import TaskOptions
    from spd_calib.api.text import TextSelection
    from spd_calib.formats.files import check_writable, dumps, write_text
    from spd_calib.ranks import is_main_rank
    from spd_calib.reporting import tables

    from .terminal import print_json, say, table, working

    check_writable({"profile": output})
    asked: dict[str, Any] = {
        "tp": tp,
        "data": data,
        "text": TextSelection(seq_len, min_len, max_samples, verify_samples, pack, column),
        "method": method,
        "strategies": strategy,
        "sync_points": [kind.strip() for kind in sync_points.split(",")],
        "target_stderr": target_stderr,
        "confidence": confidence,
        "rank_by": rank_by,
        "tasks": TaskOptions.of(tasks, include_path, limit=limit) if tasks else None,
        "run": RunOptions(device, dtype, batch_size, seed, stream),
    }
    journal = output.with_name(output.name + ".journal")
    with working("profile") as work:
        if dry_run:
            estimated = estimate_profile(model, **asked, progress=work.progress)
        else:
            document = measure(model, **asked, journal=journal, progress=work.progress)
    if dry_run:
        _print_estimate(estimated)
        if json:
            print_json(json_of(asdict(estimated), indent=1) + "\n")
        return
    write_text(output, dumps(document))
    if is_main_rank():
        journal.unlink(missing_ok=True)
    for shown in (*tables.rankings(document), *tables.by_text(document)):
        table(*shown)
    say(f"written: {output}; next: spd-calib plan {output} --max-ppl-increase 1% -o plan.json")
    if json:
        print_json(dumps(document))


def _print_estimate(estimated: "Estimate") -> None:
    from .terminal import say

    hours, seconds = divmod(round(estimated.seconds), 3600)
    say(f"time: about {hours} h {seconds // 60} min {seconds % 60} s (timed on the first sequences)")
    weights = f"of which weights {estimated.weights / 2**20:,.0f} MiB"
    say(f"memory: about {estimated.peak / 2**20:,.0f} MiB at most, {weights}")
    say("nothing was written")
