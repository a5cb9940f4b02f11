"""spd-calib demo: profile, plan, eval and a report on the model this package ships."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import COMMON, Recipe

if TYPE_CHECKING:
    from pydantic import BaseModel

    from spd_calib.reporting.table import Table


def register(app: typer.Typer) -> None:
    app.command("demo", epilog="Example: spd-calib demo -o my-first-run")(demo)


def demo(
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for what comes out.")] = Path("spd-demo"),
    json: Annotated[
        bool, typer.Option("--json", help="profile, plan and results on stdout", rich_help_panel=COMMON)
    ] = False,
    recipe: Recipe = None,
) -> None:
    """Run the whole pipeline on the embedded model and text: a few minutes on two cores, no network."""
    from spd_calib import RunOptions, TaskOptions, TextSelection, check, evaluate, plan, profile, report
    from spd_calib.formats.files import check_writable, write_bytes, write_text
    from spd_calib.reporting import tables

    from .terminal import say, working

    _make(output)
    page, figure = output / "report.html", output / "sensitivity.png"
    documents = {kind: output / f"{kind}.json" for kind in ("profile", "plan", "results")}
    check_writable({**documents, "page": page, "figure": figure})
    say("1/5 profile: what does dropping each sync point cost?")
    with working("profile") as work:
        profiled = profile("demo", tp=4, data="demo", text=TextSelection(seq_len=96), progress=work.progress)
    _show(documents["profile"], profiled, shown=tables.rankings(profiled))
    say("\n2/5 plan: which can go, if perplexity may rise by 1 %?")
    with working("measure whole plans") as work:
        planned = plan(profiled, max_ppl_increase="1%", progress=work.progress)
    _show(documents["plan"], planned, shown=[tables.blocks(planned), tables.whole_plan(planned)])
    say(f"{tables.saving(planned)}\n\n3/5 check: is the plan valid, and of this model?")
    for row in check(documents["plan"]).rows:
        say(f"{row.what}: {row.found}, {'ok' if row.ok else 'NO'}")
    say("\n4/5 eval: what does it do to tasks?")
    with working("lm-eval") as work:
        tasks, run = TaskOptions(["demo"]).with_batch_size(32), RunOptions()
        results = evaluate(documents["plan"], tasks=tasks, run=run, progress=work.progress)
    _show(documents["results"], results, shown=[tables.tasks(results)])
    say("\n5/5 report")
    made = report(output)
    write_text(page, made.html)
    write_bytes(figure, made.png())
    say(f"written: {page}, {figure}")
    if json:
        _print_all({"profile": profiled, "plan": planned, "results": results})


def _make(folder: Path) -> None:
    from spd_calib.errors import InputError

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"The folder {folder} cannot be made: {e.strerror}; choose another with -o.") from None


def _show(path: Path, document: "BaseModel", *, shown: "Sequence[Table]") -> None:
    from spd_calib.formats.files import dumps, write_text

    from .terminal import say, table

    write_text(path, dumps(document))
    for one in shown:
        table(*one)
    say(f"written: {path}")


def _print_all(documents: "Mapping[str, BaseModel]") -> None:
    from json import dumps

    from .terminal import print_json

    print_json(dumps({name: part.model_dump(mode="json") for name, part in documents.items()}, indent=1) + "\n")
