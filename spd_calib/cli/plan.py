"""spd-calib plan: from a profile and a budget to a verified plan."""

from pathlib import Path
from typing import Annotated

import typer

from .options import BatchSize, Device, Dtype, Json, Recipe

BUDGET, EVAL, LATENCY = "Budget, exactly one", "lm-eval", "Latency model"


def register(app: typer.Typer) -> None:
    app.command("plan", epilog="Example: spd-calib plan profile.json --max-ppl-increase 1% -o plan.json")(plan)


def plan(
    profile: Annotated[Path, typer.Argument(help="Written by spd-calib profile.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The plan.")] = Path("plan.json"),
    max_kl: Annotated[
        str | None, typer.Option(metavar="X", help="KL(dense || planned), nats per token.", rich_help_panel=BUDGET)
    ] = None,
    max_ppl_increase: Annotated[
        str | None, typer.Option(metavar="X", help="Relative, e.g. 1%.", rich_help_panel=BUDGET)
    ] = None,
    max_accuracy_drop: Annotated[
        str | None,
        typer.Option(metavar="X", help="1% is one point; of next tokens, or of --tasks.", rich_help_panel=BUDGET),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES", help="For --max-accuracy-drop: every 2nd document verifies.", rich_help_panel=EVAL
        ),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder with further lm-eval tasks.", rich_help_panel=EVAL)
    ] = None,
    limit: Annotated[int | None, typer.Option(min=2, help="Documents a task.", rich_help_panel=EVAL)] = None,
    max_logprob_diff: Annotated[
        str | None,
        typer.Option(metavar="X", help="Largest |delta log p| of any token, anywhere.", rich_help_panel=BUDGET),
    ] = None,
    min_speedup: Annotated[
        str | None,
        typer.Option(metavar="X", help="Share of a step's time saved, modelled, e.g. 10%.", rich_help_panel=BUDGET),
    ] = None,
    hardware: Annotated[
        str | None, typer.Option(help="hardware.json, a CSV, or a name such as h100-nvlink.", rich_help_panel=LATENCY)
    ] = None,
    phase: Annotated[
        str, typer.Option(help="decode or prefill, for --min-speedup.", rich_help_panel=LATENCY)
    ] = "decode",
    batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences in a modelled step [1].", rich_help_panel=LATENCY)
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Their tokens [at most 2048].", rich_help_panel=LATENCY)
    ] = None,
    drop: Annotated[
        str | None,
        typer.Option(metavar="N", help="Sync points dropped, or a share such as 60%.", rich_help_panel=BUDGET),
    ] = None,
    tau1: Annotated[
        float | None, typer.Option(min=0, help="The paper's rule: drop up to this (ppl).", rich_help_panel=BUDGET)
    ] = None,
    tau2: Annotated[
        float | None, typer.Option(min=0, help="With --tau1: extremely sensitive above this.", rich_help_panel=BUDGET)
    ] = None,
    each_text: Annotated[
        bool,
        typer.Option("--each-text", help="Kept on each --data of the profile, not their mean.", rich_help_panel=BUDGET),
    ] = False,
    strategy: Annotated[
        list[str] | None, typer.Option(help="block_drop or plain_drop; repeatable [as profiled].")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Measure the obvious sets of the same size, too.")] = False,
    pareto: Annotated[Path | None, typer.Option(help="The cheapest set of every size, written here.")] = None,
    batch_size: BatchSize = 8,
    device: Device = "auto",
    dtype: Dtype = None,
    json: Json = False,
    recipe: Recipe = None,
) -> None:
    """Choose the sync points to drop within exactly one budget, verified as a whole on held-out text."""
    from spd_calib.errors import InputError
    from spd_calib.formats.files import check_writable, dumps, read, write_text
    from spd_calib.formats.profile import Profile
    from spd_calib.planning.front import front_of
    from spd_calib.planning.plan import HeldOutText, make_plan
    from spd_calib.planning.search import candidates
    from spd_calib.report import tables

    from .latency import latency_models, print_held_against, say_ceiling
    from .options import check_dtype, provenance, resolve_device
    from .recovered import open_profiled
    from .shared import budget_from, further_texts, reload_texts, resolve_tasks
    from .terminal import print_json, say, table, working

    measured = read(Profile, profile)
    made = measured.provenance
    device, dtype = resolve_device(device), check_dtype(dtype or made.dtype)
    budgets = (max_kl, max_ppl_increase, max_accuracy_drop, max_logprob_diff, drop, tau1, tau2)
    _check_latency(min_speedup, hardware, phase, batch, context)
    models: dict = {}
    session = recovered = None
    if hardware:
        session, recovered = open_profiled(measured)
        models, benched = latency_models(session, hardware, batch, context, recovered.plan if recovered else None)
        if benched:
            print_held_against(models, benched)
        say_ceiling(models)
    if pareto:
        check_writable(pareto)
        if not any(b is not None for b in (*budgets, min_speedup)):
            front = front_of(measured, strategy, provenance(made.seed, device, dtype), {}, models)
            write_text(pareto, dumps(front))
            table(*tables.front_points(front))
            say(f"written: {pareto}; next: spd-calib plan {profile} --drop {front.knee} -o plan.json")
            if json:
                print_json(dumps(front))
            return
    budget = asked = budget_from(measured, *budgets, strategy, min_speedup, each_text)
    if asked.kind == "min_speedup":
        settled = len(measured.settled)
        needed = models[phase].drops_for(asked.value, settled + len(candidates(measured, asked)))
        budget = asked.model_copy(update={"kind": "drop", "value": float(max(settled, needed))})
    suites = []
    if tasks:
        from spd_calib.evaluation.harness import TaskSuite
        from spd_calib.evaluation.options import EvalOptions

        if budget.kind != "max_accuracy_drop":
            raise InputError("--tasks belongs to --max-accuracy-drop: leave it out, or give that budget.")
        if each_text:
            raise InputError("--tasks are of no text, so there is nothing to keep on each: leave --each-text out.")
        options = EvalOptions(limit=limit, batch_size=batch_size)
        suites = [TaskSuite(*resolve_tasks(tasks, include_path), options=options, half=half) for half in (0, 1)]
        budget = asked = asked.model_copy(update={"tasks": suites[0].names})
    check_writable(output)
    if session is None:
        session, recovered = open_profiled(measured)
    texts = reload_texts(session, measured)
    dense, beside = None, None
    if recovered:
        lm, dense = recovered.load(session, device, dtype, made.seed)
        beside = recovered.predictors_beside(output)
    else:
        lm = session.load(device, dtype, made.seed)
    losses = [suite.losing(lm, dense or lm, tokenizer=session.tokenizer) for suite in suites]
    with working("measure whole plans") as work:
        result, choice, compared = make_plan(
            lm,
            measured,
            budget,
            [text.calibration for text in texts],
            HeldOutText([text.verification for text in texts], measured.verify_text),
            provenance(made.seed, device, dtype),
            batch_size,
            lambda experiment, tally: work.step(),
            compare,
            recovered.plan if recovered else None,
            dense,
            beside,
            (losses[0], losses[1]) if losses else None,
            work.expect,
            lambda times: further_texts(session, texts, times),
        )
    drops = len(result.dropped) + len(result.mlp_dropped)
    result = result.model_copy(update={"budget": asked, "latency": [m.latency(drops) for m in models.values()]})
    write_text(output, dumps(result))
    print_plan(result)
    if models:
        table(*tables.latencies(result.latency))
    if choice.repaired:
        where = "further text, not used before"
        if result.verified.seen:
            where = f"the same {'documents' if budget.tasks else 'text'}: there is no other"
        say(f"repaired: {choice.repaired} given back, held-out text showed the budget broken; verified on {where}")
    if compared:
        print_comparison(compared, len(choice.dropped))
    if pareto:
        front = front_of(measured, strategy, result.provenance, choice.measured, models)
        write_text(pareto, dumps(front))
        table(*tables.front_points(front))
        say(f"written: {pareto}")
    say(f"written: {output}; next: spd-calib eval {output} --tasks ... -o results.json")
    if json:
        print_json(dumps(result))


def _check_latency(
    min_speedup: str | None, hardware: str | None, phase: str, batch: int | None, context: int | None
) -> None:
    from spd_calib.errors import InputError

    if phase not in ("decode", "prefill"):
        raise InputError(f"--phase {phase!r} is neither decode nor prefill.")
    if hardware is None and (min_speedup or batch or context):
        raise InputError(
            "--min-speedup, --batch and --context need --hardware: hardware.json, a CSV or a table's name."
        )


def print_plan(result) -> None:
    """The plan block by block, then predicted and verified side by side."""
    from spd_calib.report import tables

    from .terminal import say, table

    table(*tables.blocks(result))
    table(*tables.whole_plan(result))
    for shown in tables.verified_by_text(result):
        table(*shown)
    if lost := tables.task_losses(result):
        say(lost)
    say(tables.saving(result))


def print_comparison(compared, drops: int) -> None:
    from spd_calib.report.table import nats

    from .terminal import table

    table(
        f"{drops} sync points dropped, on the calibration text",
        ["set", "KL", "ppl", "top-1 lost, points"],
        [
            [name, nats(m.kl, m.kl_stderr), f"{100 * m.ppl_increase:+.2f} %", f"{100 * m.accuracy_drop:+.2f}"]
            for name, m in compared.items()
        ],
    )
