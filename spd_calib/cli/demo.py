"""spd-calib demo: profile, plan, eval and a report on the model this package ships."""

from pathlib import Path
from typing import Annotated

import typer

from .options import COMMON, Recipe


def register(app: typer.Typer) -> None:
    app.command("demo", epilog="Example: spd-calib demo -o my-first-run")(demo)


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for what comes out.")] = Path("spd-demo"),
    json: Annotated[
        bool, typer.Option("--json", help="profile, plan and results on stdout", rich_help_panel=COMMON)
    ] = False,
    recipe: Recipe = None,
) -> None:
    """Run the whole pipeline on the embedded model and text: a few minutes on two cores, no network."""
    from json import dumps, loads

    from spd_calib.errors import InputError

    from .check import check
    from .eval import evaluate
    from .plan import plan
    from .profile import profile
    from .report import report
    from .terminal import print_json, say

    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"The folder {output} cannot be made: {e.strerror}; choose another with -o.") from None
    profile_file, plan_file, results_file = (output / f"{name}.json" for name in ("profile", "plan", "results"))
    say("1/5 profile: what does dropping each sync point cost?")
    profile("demo", tp=4, data=["demo"], output=profile_file, seq_len=96)
    say("\n2/5 plan: which can go, if perplexity may rise by 1 %?")
    plan(profile_file, output=plan_file, max_ppl_increase="1%")
    say("\n3/5 check: is the plan valid, and of this model?")
    check(plan_file)
    say("\n4/5 eval: what does it do to tasks?")
    evaluate(plan_file, tasks="demo", output=results_file, batch_size="32")
    say("\n5/5 report")
    report(output, output=output / "report.html", png=output / "sensitivity.png")
    if json:
        files = (profile_file, plan_file, results_file)
        print_json(dumps({f.stem: loads(f.read_text(encoding="utf-8")) for f in files}, indent=1) + "\n")
