"""spd-calib recover: treat the blocks a plan drops; a checkpoint and its plan."""

from pathlib import Path
from typing import Annotated

import typer

from .options import COMMON, BatchSize, Device, Dtype, Json, ModelPlace, Recipe, Seed

TEXT, TREAT = "Text", "Treatments"


def register(app: typer.Typer) -> None:
    app.command("recover", epilog="Example: spd-calib recover plan.json --data calibration.jsonl -o recovered/")(
        recover
    )


def recover(
    plan: Annotated[Path, typer.Argument(help="Written by spd-calib plan.")],
    *,
    data: Annotated[
        str,
        typer.Option(metavar="TEXT", help="'demo', a file, a folder or a hub data set."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the checkpoint; must not exist.")
    ],
    methods: Annotated[
        str,
        typer.Option(metavar="NAMES", help="Also: distillation."),
    ] = "grouping,compensation,refit",
    max_rank: Annotated[
        int | None,
        typer.Option(min=0, help="Of predictors; 0: a mean [0 with refit; see docs].", rich_help_panel=TREAT),
    ] = None,
    exchange: Annotated[
        float, typer.Option(min=0, help="% of the missing that 1 % more weights explain.", rich_help_panel=TREAT)
    ] = 1.0,
    tau1: Annotated[
        float | None,
        typer.Option(min=0, help="Blocks up to this KL are not trained [see docs].", rich_help_panel=TREAT),
    ] = None,
    tau2: Annotated[
        float | None, typer.Option(min=0, help="Above this KL: without refit, regrouped, too.", rich_help_panel=TREAT)
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a document used [the plan's].", rich_help_panel=TEXT)
    ] = None,
    min_len: Annotated[
        int | None, typer.Option(min=2, help="Leave out shorter documents [the plan's].", rich_help_panel=TEXT)
    ] = None,
    max_samples: Annotated[
        int, typer.Option(min=1, help="To fit on and, a fifth of them, to judge by.", rich_help_panel=TEXT)
    ] = 512,
    verify_samples: Annotated[
        int, typer.Option(min=1, help="Sequences after those, to verify on.", rich_help_panel=TEXT)
    ] = 64,
    pack: Annotated[
        bool, typer.Option("--pack", help="Glue documents together, cut them at --seq-len.", rich_help_panel=TEXT)
    ] = False,
    column: Annotated[
        str, typer.Option(metavar="NAME", help="Field with the text, or with chat messages.", rich_help_panel=TEXT)
    ] = "text",
    steps: Annotated[
        int, typer.Option(min=0, help="Of training, a block; 0: only all together.", rich_help_panel=TREAT)
    ] = 200,
    final_steps: Annotated[
        int, typer.Option(min=1, help="Of training all blocks together, at the end.", rich_help_panel=TREAT)
    ] = 200,
    rate: Annotated[
        float, typer.Option(min=0, help="Of training, relative to each weight's size.", rich_help_panel=TREAT)
    ] = 0.01,
    mixed: Annotated[
        bool, typer.Option("--mixed", help="Train with bfloat16 products, float32 weights.", rich_help_panel=TREAT)
    ] = False,
    replicate: Annotated[
        str | None,
        typer.Option(metavar="X", help="Weights a rank reads more, of others' heads, e.g. 7%.", rich_help_panel=TREAT),
    ] = None,
    max_kl: Annotated[
        str | None, typer.Option(metavar="NATS", help="Give back blocks until it costs less.", rich_help_panel=TREAT)
    ] = None,
    max_ppl_increase: Annotated[
        str | None, typer.Option(metavar="%", help="The same, as a budget of perplexity.", rich_help_panel=TREAT)
    ] = None,
    batch_size: BatchSize = 16,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = None,
    stream: Annotated[bool, typer.Option("--stream", help="blocks from disk", rich_help_panel=COMMON)] = False,
    model: ModelPlace = None,
    json: Json = False,
    recipe: Recipe = None,
) -> None:
    """Regroup, compensate, refit, distil dropped blocks; a killed run goes on; torchrun's processes train together."""
    from spd_calib.api.options import RunOptions
    from spd_calib.api.recover import recover as run
    from spd_calib.api.text import TextSelection
    from spd_calib.formats.files import dumps, read
    from spd_calib.formats.recovery import REPORT_FILE, Recovery
    from spd_calib.ranks import is_main_rank
    from spd_calib.reporting.table import nats

    from .terminal import print_json, say, table, working

    with working("recover") as work:
        made = run(
            plan,
            output,
            data=data,
            model=model,
            text=TextSelection(seq_len, min_len, max_samples, verify_samples, pack, column),
            methods=[m.strip() for m in methods.split(",") if m.strip()],
            max_rank=max_rank,
            exchange=exchange,
            tau1=tau1,
            tau2=tau2,
            steps=steps,
            final_steps=final_steps,
            rate=rate,
            mixed=mixed,
            replicate=replicate,
            max_kl=max_kl,
            max_ppl_increase=max_ppl_increase,
            run=RunOptions(device, dtype, batch_size, seed, stream),
            progress=work.progress,
        )
    if not is_main_rank():
        return
    attempts = read(Recovery, output / REPORT_FILE).attempts
    alone = [
        [str(a.block), a.treatment, *(_said(a.detail[f"error_{when}"]) for when in ("before", "after")),
         "kept" if a.kept else "refused"]
        for a in attempts if a.kl_before is None
    ]  # fmt: skip
    whole = [
        ["all" if a.block is None else str(a.block), a.treatment, nats(a.kl_before),
         "not finite" if a.kl_after is None else nats(a.kl_after),
         "" if a.fell is None else f"{a.fell:+.4f} ± {a.fell_stderr:.4f}", "kept" if a.kept else "refused"]
        for a in attempts if a.kl_before is not None
    ]  # fmt: skip
    if alone:
        head = ["block", "treatment", "before", "after", ""]
        table("without training, error at the block's output (a share of it)", head, alone, left=2)
    table("KL of the whole plan", ["block", "treatment", "before", "after", "fell by", ""], whole, left=2)
    v = made.verified
    say(f"verified on other text: KL {nats(v.kl, v.kl_stderr)}, perplexity {100 * v.ppl_increase:+.2f} %")
    say(f"written: {output}, with plan.json and recovery.json in it; next: spd-calib check {output / 'plan.json'}")
    if json:
        print_json(dumps(made))


def _said(error: float | None) -> str:
    return "not finite" if error is None else f"{error:.4f}"
