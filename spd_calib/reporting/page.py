"""The page of `report`: sections of sentences, figures and tables, in one HTML file that loads nothing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import resources

from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure

from spd_calib.formats.common import ModelRef, TextRef
from spd_calib.planning.budget import describe
from spd_calib.planning.machine_tables import shipped_for

from . import figures, tables
from .draw import svg
from .run import Run
from .table import Table, nats, numeric, percentage_points

LONG = 40  # rows, from which a table is folded up
SAME = "The same numbers stand in the tables of this page."
ERRORS = (
    "Every figure after ± is one standard error over sequences, unless two are named. KL is that of the next-token "
    "distributions, dense against dropped, in nats a token.",
)


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
    """Return the HTML page of a run with the sections `shown`. The same files give the same text."""
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
    """Return text without control characters, which no page may hold; markup and other values unchanged."""
    return figures.printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def sections(run: Run) -> list[Section]:
    """Return the parts of the page: what was decided first, where it comes from last."""
    return [part(run) for part in (_plan, _sensitivity, _pareto, _evaluation, _latency, _measured, _files)]


def _summary(run: Run) -> list[str]:
    if run.plan is None:
        return ["No plan stands beside this profile yet."]
    v = run.plan.verified
    text = "that had shown the plan before it to break its budget" if v.reused else "that nothing was chosen on"
    return [
        f"{tables.saving(run.plan)}.",
        f"Asked for: {describe(run.plan.budget)}. Verified on {v.sequences} sequences {text}: KL "
        f"{nats(v.kl, v.kl_stderr)} nats a token, perplexity {100 * v.ppl_increase:+.2f} %, top-1 accuracy lost "
        f"{percentage_points(v.accuracy_drop, v.accuracy_drop_stderr)} points.",
    ]


def _plan(run: Run) -> Section:
    heading = "What was decided, predicted and verified"
    if run.plan is None:
        return _left_out("plan", heading, command="spd-calib plan profile.json --max-ppl-increase 1% -o plan.json")
    said = [
        "Predicted is what the profile says of the whole set; verified is the whole set, run on held-out "
        "text. The budget is held against the second."
        if run.plan.recovered_from is None
        else "Expected is what the profile of the recovered model says or, straight after the recovery, what it cost "
        "on the text that decided what stayed; verified is the whole, run on other text.",
    ]
    if number := run.plan.verified.round:
        t = run.plan.verified.text
        said.append(
            "Repaired: what the profile keeps for verifying had shown another plan to break its budget. Verified on "
            f"round {number} behind it: {t.source}, {t.sequences} sequences from number {t.first} on."
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
    figure, caption = _sensitivity_figure(run)
    return Section("plan", heading, said, figure, caption, shown)


def _sensitivity(run: Run) -> Section:
    shown = [*tables.rankings(run.profile), *tables.by_text(run.profile)]
    figure, caption = ("", "") if run.plan else _sensitivity_figure(run)
    return Section("sensitivity", "Sensitivity, block by block", ERRORS, figure, caption, shown)


def _sensitivity_figure(run: Run) -> tuple[str, str]:
    """Return the figure with what the plan does, where there is one, and its caption."""
    coloured = ", and what the plan does below each block" if run.plan else ""
    drawn = _svg(
        "sensitivity",
        partial(figures.sensitivity, run.profile, run.plan),
        title=f"KL of dropping each of {run.profile.model.num_blocks} blocks' sync points",
    )
    return drawn, f"One bar a block and strategy with two standard errors{coloured}. Lower is safer to drop."


def _pareto(run: Run) -> Section:
    chosen = " The diamonds are the chosen plan." if run.plan else ""
    said = [
        "The cheapest set of every size, by what the profile predicts. The knee is the size from which on each further "
        "sync point is dear."
    ]
    if "pareto" in run.stale:
        said.append(f"{run.stale['pareto']} This one is from the profile alone.")
    return Section(
        "pareto",
        "The Pareto front",
        said,
        _svg("pareto", partial(figures.pareto, run.pareto, run.plan), title="KL by the number of sync points dropped"),
        f"KL by the number of sync points dropped.{chosen}",
        [tables.pareto(run.pareto)],
    )


def _evaluation(run: Run) -> Section:
    heading = "Evaluation, dense and planned paired"
    if run.results is None:
        return _left_out(
            "evaluation",
            heading,
            command="spd-calib eval plan.json --tasks arc_easy,hellaswag -o results.json",
            why=run.stale.get("results", ""),
        )
    return Section(
        "evaluation",
        heading,
        ["Both models answer the same documents of each task; the error is of the difference, over documents."],
        _svg("tasks", partial(figures.tasks, run.results), title="Planned less dense score of each task"),
        "The difference of each task's score with two standard errors; a loss is to the left.",
        [tables.tasks(run.results)],
    )


def _latency(run: Run) -> Section:
    heading = "Latency and its ceiling"
    found = run.plan.latency if run.plan else []
    said, shown, drawn = [], [], ""
    if found:
        ceilings = ", ".join(f"{100 * m.ceiling:.1f} % of a {m.phase} step" for m in found)
        said.append(
            f"Dropping every sync point would save {ceilings}: no plan without quantised syncs saves more. Modelled, "
            "no promise."
        )
        drawn = _svg("latency", partial(figures.latency, found), title="Time of a step as planned, and the ceiling")
        shown += [tables.latencies(found), *(tables.request(run.plan) if run.plan else [])]
    if run.hardware:
        said.append(
            f"hardware.json, timed on {run.hardware.device}: dense, the plan given to bench, and every block dropped."
        )
        shown += tables.hardware(run.hardware)
    if not shown:
        table = next(iter(shipped_for(run.profile.tensor_parallel.size)), "hardware.json")
        command = f"spd-calib plan profile.json --max-ppl-increase 1% --hardware {table} -o plan.json"
        return _left_out("latency", heading, command=command, why=run.stale.get("hardware", ""))
    return Section("latency", heading, said, drawn, "A step's time, as a share of the dense model's.", shown)


def _measured(run: Run) -> Section:
    p = run.profile
    said = []
    if p.recovered:
        r = p.recovered
        said.append(
            f"A recovered checkpoint, made from {r.recovered_from.id}, which everything is compared with: its "
            f"{len(r.settled)} sync points stay dropped in every measurement, at KL "
            f"{nats(r.alone.kl, r.alone.kl_stderr)}; a block's KL is what one more costs beyond that."
        )
    baseline = f"perplexity {p.baseline.ppl:.4f}, top-1 accuracy {100 * p.baseline.top1_accuracy:.1f} %"
    rows = [
        ["model", _in_words(p.model)],
        *([["recovered from", _in_words(p.recovered.recovered_from)]] if p.recovered else []),
        ["ranks", f"tensor parallel over {p.tensor_parallel.size}"],
        ["measured", f"{p.method}: {', '.join(p.sync_points)} sync points under {', '.join(p.strategies)}"],
        ["ranked by", p.rank_by],
        *(["text to measure on", _text_in_words(text)] for text in p.text.each),
        *(["text to verify on", _text_in_words(text)] for text in p.verify_text.each),
        ["the dense model on it", f"{baseline}, {p.baseline.tokens} tokens predicted"],
    ]
    return Section("measured", "What was measured", said, tables=[Table("the profile", ["what", "value"], rows, 2)])


def _in_words(model: ModelRef) -> str:
    revision = f", revision {model.revision}" if model.revision else ""
    return f"{model.id}{revision}, {model.architecture}, {model.num_blocks} blocks"


def _text_in_words(text: TextRef) -> str:
    packed = ", packed" if text.pack else ""
    lengths = f"of {text.min_len} to {text.seq_len} tokens{packed}, {text.tokens} tokens"
    return f"{text.source}: {text.sequences} sequences from number {text.first} on, {lengths}"


def _files(run: Run) -> Section:
    rows = []
    for name, part in run.files.items():
        made = part.provenance  # type: ignore[attr-defined]
        versions = ", ".join(f"{what} {version}" for what, version in made.versions.items())
        rows.append([name, made.command, made.device, made.dtype, str(made.seed), versions])
    columns = ["file", "command", "device", "dtype", "seed", "versions"]
    said = ["Each file is made by the command beside it; the same command gives the same file."]
    shown = [
        Table("the files read", columns, rows, 6),
        Table("what they speak of", ["what", "sha256"], _hashes(run), 2),
    ]
    return Section("files", "Files, commands, versions and hashes", said, tables=shown)


def _hashes(run: Run) -> list[list[str]]:
    p = run.profile
    models = {"model": p.model} | ({"original model": p.recovered.recovered_from} if p.recovered else {})
    rows = []
    for what, model in models.items():
        rows += [[f"{what}, configuration", model.config_hash], [f"{what}, weights", model.weight_fingerprint]]
    texts = {"text to measure on": p.text, "text to verify on": p.verify_text}
    if run.plan and run.plan.verified.round:
        texts["text the plan is verified on"] = run.plan.verified.text
    return rows + [[f"{what}: {text.source}", text.sha256] for what, ref in texts.items() for text in ref.each]


def _svg(name: str, build: Callable[[], Figure], *, title: str) -> str:
    return svg(build, f"figure-{name}", title=title, description=SAME)


def _left_out(name: str, heading: str, *, command: str, why: str = "") -> Section:
    return Section(name, heading, [f"{why} Left out: `{command}` makes this part.".strip()], left_out=True)
