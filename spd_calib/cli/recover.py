"""spd-calib recover: treat the blocks a plan drops; a checkpoint and its plan."""

from pathlib import Path
from typing import Annotated

import typer

from .options import BatchSize, Device, Dtype, Json, Recipe, Seed

TEXT, TREAT = "Text", "Treatments"


def register(app: typer.Typer) -> None:
    app.command("recover", epilog="Example: spd-calib recover plan.json --data calibration.jsonl -o recovered/")(
        recover
    )


def recover(
    plan: Annotated[Path, typer.Argument(help="Written by spd-calib plan.")],
    data: Annotated[
        str,
        typer.Option(metavar="TEXT", help="'demo', .jsonl (key text), .txt, .parquet, or a hub NAME[:CONFIG[:SPLIT]]."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the checkpoint; must not exist.")
    ],
    methods: Annotated[
        str,
        typer.Option(metavar="NAMES", help="What is tried, comma-separated."),
    ] = "grouping,compensation,distillation",
    max_rank: Annotated[
        int | None,
        typer.Option(min=0, help="Bound on the predictor; 0: the mean shift only [full].", rich_help_panel=TREAT),
    ] = None,
    exchange: Annotated[
        float, typer.Option(min=0, help="% of the missing that 1 % more weights explain.", rich_help_panel=TREAT)
    ] = 1.0,
    tau1: Annotated[
        float | None, typer.Option(min=0, help="Blocks up to this KL are left alone [see docs].", rich_help_panel=TREAT)
    ] = None,
    tau2: Annotated[
        float | None, typer.Option(min=0, help="Blocks above this KL are regrouped, too.", rich_help_panel=TREAT)
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
    steps: Annotated[int, typer.Option(min=1, help="Of training, a block.", rich_help_panel=TREAT)] = 200,
    final_steps: Annotated[
        int, typer.Option(min=1, help="Of training all blocks together, at the end.", rich_help_panel=TREAT)
    ] = 200,
    rate: Annotated[
        float, typer.Option(min=0, help="Of training, relative to each weight's size.", rich_help_panel=TREAT)
    ] = 0.01,
    batch_size: BatchSize = 16,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = None,
    json: Json = False,
    recipe: Recipe = None,
) -> None:
    """Regroup, compensate and distil the blocks a plan drops; keep what makes the whole plan better.

    A killed run goes on when given again. Under torchrun, processes train together.
    """
    from spd_calib.errors import InputError
    from spd_calib.formats.files import dumps, read, sha256_of
    from spd_calib.formats.plan import Plan
    from spd_calib.models.load import load_dense
    from spd_calib.parallel.comm import Distributed
    from spd_calib.parallel.distributed import local_device
    from spd_calib.parallel.session import open_session
    from spd_calib.ranks import is_main_rank, world_size
    from spd_calib.recovery import checkpoint, treatment
    from spd_calib.recovery.distillation import Schedule
    from spd_calib.recovery.journal import Journal
    from spd_calib.recovery.planned import HeldOut, PlannedModel
    from spd_calib.recovery.recover import METHODS, Options
    from spd_calib.recovery.recover import recover as treat
    from spd_calib.report.table import nats

    from .options import check_dtype, provenance, resolve_device, resolve_model
    from .shared import load_text_for
    from .terminal import print_json, say, table, working

    chosen = tuple(dict.fromkeys(m.strip() for m in methods.split(",") if m.strip()))
    if not chosen or (wrong := [m for m in chosen if m not in METHODS]):
        raise InputError(f"--methods {wrong[0] if chosen else methods!r} is none of {', '.join(METHODS)}.")
    planned = read(Plan, plan)
    block_tiers, said = treatment.tiers_of(planned, tau1, tau2)
    checkpoint.check_output(output)
    dtype, used = check_dtype(dtype or planned.provenance.dtype), planned.verified.text
    session = open_session(resolve_model(planned.model.id), planned.tensor_parallel.size, planned.model, replicas=True)
    device = local_device(resolve_device(device))
    text = load_text_for(
        session, data, seq_len or used.seq_len, min_len or (used.min_len if seq_len is None else None),
        max_samples, verify_samples, pack or used.pack,
    )  # fmt: skip
    if text.note:
        say(text.note)
    judged = max(2, len(text.calibration) // 5)
    fitting, held_out = text.calibration[:-judged], text.calibration[-judged:]
    say(said + ": " + ", ".join(f"{b} {t}" for b, t in block_tiers.items()))
    say(f"{len(fitting)} sequences to fit on, {judged} to judge by, {len(text.verification)} to verify on")
    options = Options(
        methods=chosen,  # type: ignore[arg-type]
        max_rank=max_rank, exchange=exchange, batch_size=batch_size, seed=seed,
        block_schedule=Schedule(steps=steps, rate=rate, seed=seed),
        whole_schedule=Schedule(steps=final_steps, rate=rate, seed=seed),
    )  # fmt: skip
    dense = load_dense(session.source, session.config, device=device, dtype=dtype)
    model = PlannedModel(dense, session.tp, *treatment.strategies(planned))
    run = {"plan": sha256_of(plan), "text": text.calibration_ref().sha256, "options": repr(options), "dtype": dtype,
           "tiers": repr(block_tiers)}  # fmt: skip
    journal = Journal(output.absolute().parent / f"{output.name}.partial", run)
    with working("recover", _ticks(block_tiers, chosen, options)) as work:
        report = treat(
            model, fitting, held_out, block_tiers, options, journal, work.step,
            Distributed() if world_size() > 1 else None,
        )  # fmt: skip
        if not is_main_rank():
            return
        checkpoint.round_to_storage(model, checkpoint.storage_dtype(session.config))
        verified = HeldOut(model, text.verification, batch_size).measure()
        judgement = HeldOut(model, held_out, batch_size).measure()
        made = checkpoint.write_checkpoint(
            output, model, session.source,
            lambda ref, beside: treatment.new_plan(
                planned, model, report, judgement, verified, text.verification_ref(), ref, beside,
                provenance(seed, device, dtype),
            ),
            report.json() | {"tiers_from": said},
        )  # fmt: skip
    journal.remove()
    rows = [
        ["all" if a.block is None else str(a.block), a.treatment, nats(a.kl_before), nats(a.kl_after),
         f"{a.fell:+.4f} ± {a.fell_stderr:.4f}", "kept" if a.kept else "refused"]
        for a in report.attempts
    ]  # fmt: skip
    table("treatments, KL of the whole plan", ["block", "treatment", "before", "after", "fell by", ""], rows, left=2)
    v = made.verified
    say(f"verified on other text: KL {nats(v.kl, v.kl_stderr)}, perplexity {100 * v.ppl_increase:+.2f} %")
    say(f"written: {output}, with plan.json and recovery.json in it; next: spd-calib check {output / 'plan.json'}")
    if json:
        print_json(dumps(made))


def _ticks(block_tiers, methods, options) -> int:
    """Steps of the progress bar, at most: training may end early, and treatments are left out where they do nothing."""
    treated = sum(t != "insensitive" for t in block_tiers.values())
    if not treated:
        return 0
    per_block, end = (-(-s.steps // s.check_every) + 1 for s in (options.block_schedule, options.whole_schedule))
    trained = treated * per_block + end if "distillation" in methods else 0
    return treated * len(set(methods) - {"distillation"}) + trained
