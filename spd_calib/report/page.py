"""The page of `report`: sections of sentences, figures and tables, in one HTML file that loads nothing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import resources

from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure

from spd_calib.formats.common import ModelRef, TextRef
from spd_calib.planning.budget import describe

from . import figures, tables
from .draw import svg
from .run import Run
from .table import Table, nats, numeric, percentage_points

LONG = 40  # rows, from which a table is folded up
SAME = "The same numbers stand in the table below."


@dataclass(frozen=True)
class Section:
    """`figure` is an <svg>; everything else is text."""

    name: str
    heading: str
    said: Sequence[str] = ()
    figure: str = ""
    caption: str = ""
    tables: Sequence[Table] = field(default_factory=tuple)
    left_out: bool = False


def page(run: Run, shown: Sequence[Section]) -> str:
    """HTML of `sections(run)`. The same files give the same text."""
    environment = Environment(
        autoescape=True, finalize=_shown, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(numeric=numeric, long=LONG)
    template = environment.from_string((resources.files(__package__) / "page.html").read_text(encoding="utf-8"))
    return template.render(
        title=f"Sync-Point Drop: {run.profile.model.id}, TP {run.profile.tensor_parallel.size}",
        summary=_summary(run),
        sections=shown,
    )


def _shown(value: object) -> object:
    """What a file holds without control characters, which no page may hold; what is markup already as it is."""
    return figures.printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def sections(run: Run) -> list[Section]:
    return [part(run) for part in (_measured, _sensitivity, _plan, _front, _evaluation, _latency, _files)]


def _summary(run: Run) -> list[str]:
    if run.plan is None:
        return ["No plan stands beside this profile yet."]
    v = run.plan.verified
    text = "that had shown the plan before it to break its budget" if v.seen else "that nothing was chosen on"
    return [
        f"{tables.saving(run.plan)}.",
        f"Asked for: {describe(run.plan.budget)}. Verified on {v.sequences} sequences {text}: KL "
        f"{nats(v.kl, v.kl_stderr)} nats a token, perplexity {100 * v.ppl_increase:+.2f} %, top-1 accuracy lost "
        f"{percentage_points(v.accuracy_drop, v.accuracy_drop_stderr)} points.",
    ]


def _measured(run: Run) -> Section:
    p = run.profile
    said = [
        "Every figure after ± is one standard error over sequences, unless two are named. KL is that of the next-token "
        "distributions, dense against dropped, in nats a token."
    ]
    if p.recovered:
        r = p.recovered
        said.append(
            f"A recovered checkpoint, made from {r.recovered_from.id}, which everything is compared with: its "
            f"{len(r.settled)} sync points stay dropped in every measurement, at KL "
            f"{nats(r.alone.kl, r.alone.kl_stderr)}; a block's KL is what one more costs beyond that."
        )
    baseline = f"perplexity {p.baseline.ppl:.4f}, top-1 accuracy {100 * p.baseline.top1_accuracy:.1f} %"
    rows = [
        *_model_rows("model", p.model),
        ["ranks", f"tensor parallel over {p.tensor_parallel.size}"],
        ["measured", f"{p.method}: {', '.join(p.sync_points)} sync points under {', '.join(p.strategies)}"],
        ["ranked by", p.rank_by],
        *_text_rows("text to measure on", p.text),
        *_text_rows("text to verify on", p.verify_text),
        ["the dense model on it", f"{baseline}, {p.baseline.tokens} tokens predicted"],
    ]
    if p.recovered:
        rows += _model_rows("recovered from", p.recovered.recovered_from)
    return Section("measured", "What was measured", said, tables=[Table("the profile", ["what", "value"], rows, 2)])


def _model_rows(what: str, model: ModelRef) -> list[list[str]]:
    revision = f", revision {model.revision}" if model.revision else ""
    return [
        [what, f"{model.id}{revision}, {model.architecture}, {model.num_blocks} blocks"],
        ["its configuration, sha256", model.config_hash],
        ["its weights, sha256", model.weight_fingerprint],
    ]


def _text_rows(what: str, text: TextRef) -> list[list[str]]:
    rows = []
    for one in text.each:
        packed = ", packed" if one.pack else ""
        lengths = f"of {one.min_len} to {one.seq_len} tokens{packed}, {one.tokens} tokens"
        rows += [
            [what, f"{one.source}: {one.sequences} sequences from number {one.first} on, {lengths}"],
            ["its sha256", one.sha256],
        ]
    return rows


def _sensitivity(run: Run) -> Section:
    coloured = ", and what the plan does below each block" if run.plan else ""
    return Section(
        "sensitivity",
        "Sensitivity, block by block",
        figure=_svg(
            "sensitivity",
            partial(figures.sensitivity, run.profile, run.plan),
            f"KL of dropping each of {run.profile.model.num_blocks} blocks' sync points",
        ),
        caption=f"One bar a block and strategy with two standard errors{coloured}. Lower is safer to drop.",
        tables=[*tables.rankings(run.profile), *tables.by_text(run.profile)],
    )


def _plan(run: Run) -> Section:
    heading = "The plan, predicted and verified"
    if run.plan is None:
        return _left_out("plan", heading, "spd-calib plan profile.json --max-ppl-increase 1% -o plan.json")
    said = [
        "Predicted is what the profile says of the whole set; verified is the whole set, run on held-out "
        "text. The budget is held against the second.",
    ]
    if lot := run.plan.verified.lot:
        t = run.plan.verified.text
        said.append(
            "Repaired: what the profile keeps for verifying had shown another plan to break its budget. Verified on lot"
            f" {lot} behind it: {t.source}, {t.sequences} sequences from number {t.first} on, sha256 {t.sha256}."
        )
    if run.plan.recovered_from:
        said.append(f"Of a recovered checkpoint: verified against {run.plan.recovered_from.id}, its original.")
    kinds = [b.compensation.kind for b in run.plan.blocks if b.compensation]
    if kinds:
        counted = ", ".join(f"{kinds.count(k)} {k}" for k in dict.fromkeys(kinds))
        said.append(f"{len(kinds)} blocks have a predictor in place of what their MLP misses: {counted}.")
    if lost := tables.task_losses(run.plan):
        said.append(f"{lost}.")
    shown = [tables.whole_plan(run.plan), *tables.verified_by_text(run.plan), tables.blocks(run.plan)]
    return Section("plan", heading, said, tables=shown)


def _front(run: Run) -> Section:
    chosen = " The diamonds are the chosen plan." if run.plan else ""
    said = [
        "The cheapest set of every size, by what the profile predicts. The knee is the size from which on each further "
        "sync point is dear."
    ]
    if "front" in run.stale:
        said.append(f"{run.stale['front']} This one is from the profile alone.")
    return Section(
        "front",
        "The Pareto front",
        said,
        _svg("front", partial(figures.front, run.front, run.plan), "KL by the number of sync points dropped"),
        f"KL by the number of sync points dropped.{chosen}",
        [tables.front_points(run.front)],
    )


def _evaluation(run: Run) -> Section:
    heading = "Evaluation, dense and planned paired"
    if run.results is None:
        return _left_out(
            "evaluation",
            heading,
            "spd-calib eval plan.json --tasks arc_easy,hellaswag -o results.json",
            run.stale.get("results", ""),
        )
    limit = f"the first {run.results.limit} documents of each task" if run.results.limit else "all documents"
    return Section(
        "evaluation",
        heading,
        [f"Both models answer the same documents ({limit}); the error is of the difference, over documents."],
        _svg("tasks", partial(figures.tasks, run.results), "Planned less dense score of each task"),
        "The difference of each task's score with two standard errors; a loss is to the left.",
        [tables.tasks(run.results)],
    )


def _latency(run: Run) -> Section:
    heading = "Latency and its ceiling"
    found = run.plan.latency if run.plan else []
    said, shown, drawn = [], [], ""
    if found:
        ceilings = ", ".join(f"{100 * m.ceiling:.1f} % of a {m.phase} step" for m in found)
        said.append(f"Dropping every sync point would save {ceilings}: no plan saves more. Modelled, no promise.")
        drawn = _svg("latency", partial(figures.latency, found), "Time of a step as planned, and the ceiling")
        shown.append(tables.latencies(found))
    if run.hardware:
        said.append(
            f"hardware.json, timed on {run.hardware.device}: dense, the plan given to bench, and every block dropped."
        )
        shown += tables.hardware(run.hardware)
    if not shown:
        command = "spd-calib plan profile.json --max-ppl-increase 1% --hardware h100-nvlink -o plan.json"
        return _left_out("latency", heading, command, run.stale.get("hardware", ""))
    return Section("latency", heading, said, drawn, "A step's time, as a share of the dense model's.", shown)


def _files(run: Run) -> Section:
    rows = []
    for name, part in run.files.items():
        made = part.provenance  # type: ignore[attr-defined]
        versions = ", ".join(f"{what} {version}" for what, version in made.versions.items())
        rows.append([name, made.command, made.device, made.dtype, str(made.seed), versions])
    columns = ["file", "command", "device", "dtype", "seed", "versions"]
    said = ["Each file is made by the command beside it; the same command gives the same file."]
    return Section("files", "Files, commands and versions", said, tables=[Table("the files read", columns, rows, 6)])


def _svg(name: str, build: Callable[[], Figure], title: str) -> str:
    return svg(build, f"figure-{name}", title, SAME)


def _left_out(name: str, heading: str, command: str, why: str = "") -> Section:
    return Section(name, heading, [f"{why} Left out: `{command}` makes this part.".strip()], left_out=True)
