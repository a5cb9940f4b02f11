"""spd-calib plan: from a profile and a budget to a verified plan."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import COMMON, BatchSize, Device, Dtype, Json, ModelPlace, Recipe

if TYPE_CHECKING:
    from spd_calib.api.plan import PlanningResult

BUDGET, LATENCY = "Budget, exactly one", "Latency model"


def register(app: typer.Typer) -> None:
    app.command("plan", epilog="Example: spd-calib plan profile.json --max-ppl-increase 1% -o plan.json")(plan)


def plan(
    profile: Annotated[Path, typer.Argument(help="Written by spd-calib profile.")],
    *,
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
    tasks: Annotated[str | None, typer.Option(metavar="NAMES", rich_help_panel=COMMON)] = None,
    include_path: Annotated[Path | None, typer.Option(metavar="DIR", help="of tasks", rich_help_panel=COMMON)] = None,
    limit: Annotated[int | None, typer.Option(min=2, help="documents", rich_help_panel=COMMON)] = None,
    max_logprob_diff: Annotated[
        str | None,
        typer.Option(metavar="X", help="Largest |delta log p| of any token, anywhere.", rich_help_panel=BUDGET),
    ] = None,
    min_speedup: Annotated[
        str | None,
        typer.Option(metavar="X", help="Share of a step's time saved, modelled, e.g. 10%.", rich_help_panel=BUDGET),
    ] = None,
    max_bytes: Annotated[
        str | None,
        typer.Option(metavar="X", help="Share of the syncs' bytes that are sent, e.g. 25%.", rich_help_panel=BUDGET),
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
    new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Of a request: prefill and decode may differ.", rich_help_panel=LATENCY),
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
    compare: Annotated[
        bool, typer.Option("--compare", help="Measure baseline sets of its size; take the best.")
    ] = False,
    sync_bits: Annotated[
        str | None, typer.Option(metavar="N", help="8, 6 or 4 bits a value in every sync kept, or any.")
    ] = None,
    replicate: Annotated[
        str | None, typer.Option(metavar="X", help="Weights a rank reads more, of others' heads, e.g. 7%.")
    ] = None,
    pareto: Annotated[Path | None, typer.Option(help="The cheapest set of every size, written here.")] = None,
    model: ModelPlace = None,
    batch_size: BatchSize = 8,
    device: Device = "auto",
    dtype: Dtype = None,
    json: Json = False,
    recipe: Recipe = None,
) -> None:
    """Choose what to drop within exactly one budget, verified on held-out text."""
    from spd_calib.api.latency import latency_options
    from spd_calib.api.options import RunOptions
    from spd_calib.api.pareto import pareto as pareto_of
    from spd_calib.api.plan import plan_with_details
    from spd_calib.api.tasks import TaskOptions
    from spd_calib.formats.files import check_writable, dumps, write_text
    from spd_calib.planning.budget_options import BudgetOptions
    from spd_calib.reporting import tables

    from .terminal import print_json, say, table, working

    asked = BudgetOptions(
        max_kl=max_kl,
        max_ppl_increase=max_ppl_increase,
        max_accuracy_drop=max_accuracy_drop,
        max_logprob_diff=max_logprob_diff,
        min_speedup=min_speedup,
        max_bytes=max_bytes,
        drop=drop,
        tau1=tau1,
        tau2=tau2,
        each_text=each_text,
        strategies=strategy,
    )
    latency = latency_options(hardware, phase=phase, batch=batch, context=context, new_tokens=new_tokens)
    run = RunOptions(device=device, dtype=dtype, batch_size=batch_size)
    only_pareto = pareto is not None and asked.nothing
    check_writable({"pareto": pareto, "plan": None if only_pareto else output})
    result = None
    with working("measure whole plans") as work:
        if only_pareto:
            cheapest = pareto_of(
                profile, strategies=strategy, latency=latency, model=model, run=run, progress=work.progress
            )
        else:
            result = plan_with_details(
                profile,
                asked,
                tasks=TaskOptions.of(tasks, include_path, limit=limit) if tasks else None,
                latency=latency,
                compare=compare,
                sync_bits=int(sync_bits) if sync_bits and sync_bits.isdecimal() else sync_bits,
                replicate=replicate,
                model=model,
                run=run,
                progress=work.progress,
            )
            cheapest = result.pareto
    if result:
        result.write(output)
        print_result(result)
    if pareto:
        write_text(pareto, dumps(cheapest))
        table(*tables.pareto(cheapest))
        following = f"; next: spd-calib plan {profile} --drop {cheapest.knee} -o plan.json" if only_pareto else ""
        say(f"written: {pareto}{following}")
    if result:
        following = f"eval {output} --tasks ... -o results.json"
        if result.plan.in_two_phases:
            following = f"check {output} --runtime torchrun"
        say(f"written: {output}; next: spd-calib {following}")
    if json:
        print_json(dumps(result.plan if result else cheapest))


def print_result(result: "PlanningResult") -> None:
    """Print the plan block by block, then predicted and verified side by side, and what else was found."""
    from spd_calib.reporting import tables

    from .terminal import say, table

    plan = result.plan
    table(*tables.blocks(plan))
    table(*tables.whole_plan(plan))
    for shown in tables.verified_by_text(plan):
        table(*shown)
    if lost := tables.task_losses(plan):
        say(lost)
    say(tables.saving(plan))
    if plan.latency:
        table(*tables.latencies(plan.latency))
    for shown in tables.request(plan):
        table(*shown)
    if result.given_back:
        where = "further text, not used before"
        if plan.verified.reused:
            where = f"the same {'documents' if plan.budget.tasks else 'text'}: there is no other"
        say(f"repaired: {result.given_back} given back, held-out text showed the budget broken; verified on {where}")
    if result.compared:
        table(*tables.compared(result.compared))
