"""spd-calib plan: from a profile and a budget to a verified plan."""

from pathlib import Path
from typing import Annotated

import typer

from .options import BatchSize, Device, Json, Recipe


def register(app: typer.Typer) -> None:
    app.command("plan", epilog="Example: spd-calib plan profile.json --max-ppl-increase 1% -o plan.json")(plan)


def plan(
    profile: Annotated[Path, typer.Argument(help="Written by spd-calib profile.")],
    output: Annotated[Path, typer.Option("--output", "-o")] = Path("plan.json"),
    max_kl: Annotated[str | None, typer.Option(help="Budget: KL(dense || planned), nats per token.")] = None,
    max_ppl_increase: Annotated[str | None, typer.Option(help="Budget: relative, e.g. 1%.")] = None,
    max_accuracy_drop: Annotated[
        str | None, typer.Option(help="Budget: next-token top-1 accuracy lost, e.g. 1% for one point.")
    ] = None,
    drop: Annotated[str | None, typer.Option(help="Drop that many blocks, or a share such as 60%.")] = None,
    tau1: Annotated[
        float | None, typer.Option(min=0, help="The paper's rule: drop up to this sensitivity (ppl).")
    ] = None,
    tau2: Annotated[float | None, typer.Option(min=0, help="With --tau1: extremely sensitive above this.")] = None,
    strategy: Annotated[
        list[str] | None, typer.Option(help="block_drop or plain_drop; repeatable [default: those profiled].")
    ] = None,
    batch_size: BatchSize = 8,
    device: Device = "auto",
    dtype: Annotated[str | None, typer.Option(help="[default: the profile's].")] = None,
    json: Json = False,
    recipe: Recipe = None,
) -> None:
    """Choose the blocks to drop within exactly one budget, verified as a whole on held-out text."""
    from spd_calib.formats.files import check_writable, dumps, read, write_text
    from spd_calib.formats.profile import Profile
    from spd_calib.parallel.session import open_session
    from spd_calib.planning.plan import make_plan

    from .options import check_dtype, provenance, resolve_device, resolve_model
    from .shared import budget_from, reload_text
    from .terminal import print_json, say, working

    measured = read(Profile, profile)
    budget = budget_from(measured, max_kl, max_ppl_increase, max_accuracy_drop, drop, tau1, tau2, strategy)
    check_writable(output)
    made = measured.provenance
    device, dtype = resolve_device(device), check_dtype(dtype or made.dtype)
    session = open_session(resolve_model(measured.model.id), measured.tensor_parallel.size, measured.model)
    text = reload_text(session, measured.text, measured.verify_text)
    with working("measure whole plans", None) as work:
        result, choice = make_plan(
            session.load(device, dtype, made.seed),
            measured,
            budget,
            text.calibration,
            text.verification,
            measured.verify_text,
            provenance(made.seed, device, dtype),
            batch_size,
            lambda experiment, tally: work.step(),
        )
    write_text(output, dumps(result))
    print_plan(result)
    if choice.repaired:
        say(f"repaired: {choice.repaired} blocks given back, the held-out text showed the budget broken with them")
    say(f"written: {output}; next: spd-calib eval {output} --tasks ... -o results.json")
    if json:
        print_json(dumps(result))


def print_plan(result) -> None:
    """The plan block by block, then predicted and verified side by side."""
    from spd_calib.planning.budget import describe

    from .terminal import say, table

    table(
        f"plan for {result.model.id} at TP {result.tensor_parallel.size}, asked for: {describe(result.budget)}",
        ["block", "strategy", "KL alone", "why"],
        [[str(b.index), b.strategy, "" if b.kl is None else f"{b.kl:.4f}", b.reason] for b in result.blocks],
        left=2,
    )
    p, v = result.predicted, result.verified
    table(
        "the whole plan",
        ["", "KL", "ppl", "top-1 lost, points"],
        [
            ["sum of single drops", f"{p.kl:.4f}", f"{100 * p.ppl_increase:+.2f} %", f"{100 * p.accuracy_drop:+.2f}"],
            [
                "verified, held-out text",
                f"{v.kl:.4f} ± {v.kl_stderr:.4f}",
                f"{100 * v.ppl_increase:+.2f} %",
                f"{100 * v.accuracy_drop:+.2f} ± {100 * v.accuracy_drop_stderr:.2f}",
            ],
        ],
    )
    n, before = len(result.dropped), 2 * len(result.blocks)
    say(f"{n} of {len(result.blocks)} attention all-reduces dropped: {before} a forward and rank become {before - n}")
