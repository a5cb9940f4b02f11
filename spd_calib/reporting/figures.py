"""The files as figures of matplotlib, neither written nor shown yet."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from spd_calib.formats.drops import Strategy
from spd_calib.formats.pareto import Pareto
from spd_calib.formats.plan import Latency, Plan
from spd_calib.formats.profile import Profile
from spd_calib.formats.results import Results

# Okabe and Ito's palette: distinguishable with any colour vision, and in grey
COLOURS = {Strategy.KEEP_SYNC: "#0072B2", Strategy.BLOCK_DROP: "#009E73", Strategy.PLAIN_DROP: "#E69F00"}
PLAN, QUIET = "#CC79A7", "#808080"  # what the plan is, and what it is held against
WIDEST = 10.0  # inches


def sensitivity(profile: Profile, plan: Plan | None, *, title: bool = False) -> Figure:
    """Draw KL of dropping each block, one bar a strategy and kind of sync point; below, what a plan drops."""
    blocks = range(profile.model.num_blocks)
    fig, ax = _axes(min(max(6.0, 0.35 * len(blocks) + 2), WIDEST), 4.6)
    series = [(s, kind) for kind in profile.sync_points for s in profile.strategies if profile.kl(s, kind)]
    width = 0.8 / len(series)
    what = {"single": "dropped alone", "cumulative": "added cost", "fisher": "predicted"}[profile.method]
    for i, (strategy, kind) in enumerate(series):
        kl = profile.kl(strategy, kind)
        ax.bar(
            [b + (i - (len(series) - 1) / 2) * width for b in kl],
            [value for value, _ in kl.values()],
            width * 0.92,
            yerr=[_two(stderr) for _, stderr in kl.values()],
            color=COLOURS[strategy],
            alpha=0.5 if kind == "mlp" else 1,
            hatch="//" if kind == "mlp" else None,
            error_kw={"linewidth": 1, "capsize": 2},
            label=f"{what}: {strategy}{' of the MLP' if kind == 'mlp' else ''}",
        )
    if plan is not None:
        for b in plan.blocks:
            ax.axvspan(b.index - 0.45, b.index + 0.45, ymin=-0.03, ymax=-0.01, color=COLOURS[b.strategy], clip_on=False)
        planned = [b.strategy for b in plan.blocks]
        for strategy in (s for s in Strategy if s in planned):
            ax.plot([], [], "s", color=COLOURS[strategy], label=f"plan: {strategy} ({planned.count(strategy)})")
        if mlps := plan.drops.blocks("mlp"):
            ax.plot(mlps, [0] * len(mlps), "kv", ms=4, label="plan: MLP dropped", clip_on=False)
    found = [pair for strategy, kind in series for pair in profile.kl(strategy, kind).values()]
    errors = "" if all(stderr is None for _, stderr in found) else " (± 2 s.e.)"
    ax.set(xlabel="block", ylabel=f"KL(dense || dropped), nats a token{errors}")
    heights = [value for value, _ in found if value > 0]
    if _spread_out(heights):
        ax.set_yscale("log")
        ax.set_ylim(bottom=max(min(heights), 1e-5) / 2)
    else:
        ax.set_ylim(bottom=0)
    ax.tick_params(axis="x", length=0, pad=8)
    ax.set_xticks(range(0, len(blocks), max(1, len(blocks) // 20)))
    ax.set_xlim(-0.7, len(blocks) - 0.3)
    _plain_ticks(ax)
    if title:
        name = f"{printable(profile.model.id)}, TP {profile.tensor_parallel.size}"
        ax.set_title(f"{name}: cost of dropping a sync point", fontsize="medium")
    _legend(fig)
    return fig


def pareto(found: Pareto, plan: Plan | None) -> Figure:
    """Draw KL by the number of drops: predicted, measured where it was, the knee; the plan, predicted and verified."""
    fig, ax = _axes(6, 4)
    drops = [p.drops for p in found.points]
    predicted = [p.predicted_kl for p in found.points]
    ax.plot(drops, predicted, "o-", ms=4, color=COLOURS[Strategy.KEEP_SYNC], label="cheapest set, predicted")
    measured = [(p.drops, p.measured_kl) for p in found.points if p.measured_kl is not None]
    if measured:
        ax.plot(*zip(*measured, strict=True), "x", color="black", label="measured, calibration text")
    ax.axvline(found.knee, color=QUIET, linestyle=":", label=f"knee, {found.knee} dropped")
    heights = [*predicted, *(kl for _, kl in measured)]
    if plan is not None:
        n, v = len(plan.drops), plan.verified
        ax.plot([n], [plan.predicted.kl], "D", ms=9, mfc="none", color=PLAN, label="the plan, predicted")
        ax.errorbar([n], [v.kl], _two(v.kl_stderr), fmt="D", color=PLAN, capsize=3, label="verified (± 2 s.e.)")
        heights += [plan.predicted.kl, v.kl]
    positive = [h for h in heights if h > 0]
    if _spread_out(positive):
        ax.set_yscale("symlog", linthresh=max(min(positive), 1e-5))  # no drop costs 0, which a logarithm has not
        ax.set_ylim(min(0, *heights), 2 * max(heights))
    else:
        ax.set_ylim(bottom=min(0, *heights))
    ax.set(xlabel="sync points dropped", ylabel="KL, nats a token")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    _plain_ticks(ax)
    _legend(fig)
    return fig


def tasks(results: Results) -> Figure:
    """Draw planned less dense, task by task, with two standard errors; a loss is to the left, whatever the metric."""
    rows = list(reversed(results.tasks))
    fig, ax = _axes(6, 1.2 + 0.35 * len(rows))
    errors = [_two(r.difference_stderr) for r in rows]
    differences = [r.difference if r.higher_is_better else -r.difference for r in rows]
    ax.axvline(0, color=QUIET, linewidth=1)
    ax.errorbar(differences, range(len(rows)), xerr=errors, fmt="D", color=PLAN, capsize=3)
    ax.set_yticks(range(len(rows)), [f"{printable(r.task)}, {printable(r.metric)}" for r in rows])
    ax.set(xlabel="planned against dense (± 2 s.e.): worse to the left", ylim=(-0.6, len(rows) - 0.4))
    ax.margins(x=0.1)
    return fig


def latency(found: Sequence[Latency]) -> Figure:
    """Draw a step as planned and with every droppable sync point dropped, as shares of the dense one."""
    fig, ax = _axes(6, 1.4 + 0.8 * len(found))
    kinds = {
        "every sync point kept": (COLOURS[Strategy.KEEP_SYNC], [1.0 for _ in found]),
        "as planned": (PLAN, [1 - m.saved for m in found]),
        "every sync point dropped: the ceiling": (QUIET, [1 - m.ceiling for m in found]),
    }
    for i, (label, (colour, shares)) in enumerate(kinds.items()):
        places = [place + 0.27 * (i - 1) for place in range(len(found))]
        ax.barh(places, [100 * share for share in shares], 0.24, color=colour, label=label)
    ax.set_yticks(range(len(found)), [m.phase for m in found])
    ax.invert_yaxis()
    ax.set(xlabel="time of a step, % of the dense model's", xlim=(0, 100 * max(1.0, *(1 - m.saved for m in found))))
    _legend(fig)
    return fig


def printable(text: str) -> str:
    """Return words from a file without what no font shows and no XML holds."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    fig = Figure(figsize=(width, height), layout="constrained")
    ax = fig.add_subplot()
    ax.spines[["top", "right"]].set_visible(False)
    return fig, ax


def _legend(fig: Figure) -> None:
    fig.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")


def _two(stderr: float | None) -> float:
    """Return two standard errors; NaN, which is not drawn, where there is none."""
    return math.nan if stderr is None else 2 * stderr


def _spread_out(heights: Sequence[float]) -> bool:
    """Say whether the highest would hide all others."""
    return bool(heights) and max(heights) > 100 * sorted(heights)[len(heights) // 2]


def _plain_ticks(ax: Axes) -> None:
    """Write plain numbers: text that a page can hold, not formulas."""
    if ax.get_yscale() != "linear":
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.yaxis.set_minor_formatter(lambda value, _: "")
