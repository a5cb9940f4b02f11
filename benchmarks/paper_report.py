"""The methods of the paper's table (paper_table.py), by name, and its rows as Markdown and as a figure."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

ANY_RANK = 10**6
DISTILLED_REPLICATED = "distilled, with heads replicated"
WITHIN = "with heads replicated, blocks given back for +1 % perplexity"
REPLICATED, MORE = "with heads replicated", 0.07  # of other ranks: so many more weights, where not said otherwise
WITH_HEADS = (REPLICATED, DISTILLED_REPLICATED, WITHIN)
MAX_RANK = {
    "free at run time": 0,
    REPLICATED: 0,
    "with predictors": ANY_RANK,
    "distilled": 0,
    "distilled, with predictors": ANY_RANK,
    DISTILLED_REPLICATED: 0,
    WITHIN: 0,
}
NAIVE = "as is, no estimate"  # behind a norm: an MLP reads its rank's own partial sum through it
METHODS = (NAIVE, "as is", *MAX_RANK)
PUBLISHED = (
    "Published figures beside it: Sync-Point Drop (arXiv 2502.20727), LLaMA2-70B on 8 GPUs over a 10 GB/s link: 70 % "
    "of the attention syncs dropped without training cost 0.94 points and save 19.7 % of the latency; 75 % of its "
    "blocks are insensitive; LLaMA2-7B with all of them dropped loses more than 5 points. Affinity-aware sharding "
    "(arXiv 2609.13846), Qwen3-0.6B on 4 devices, both syncs of every block delayed, 33M tokens of training: KL 0.265."
)


def key_of(row: dict) -> tuple:
    """Return what tells a row from the others."""
    method = row["method"]
    more = row.get("replicate", MORE) if method in WITH_HEADS else None  # the first rows do not say it
    return method, row["share"], row["sequences"] if method in MAX_RANK else None, more


def _place(row: dict) -> tuple:
    return METHODS.index(row["method"]), key_of(row)[-1] or 0, row["sequences"]


def lost(row: dict) -> tuple[float, float]:
    """Return the mean accuracy lost over the tasks, in points, and its standard error."""
    tasks = list(row["tasks"].values())
    error = math.sqrt(sum(t["stderr"] ** 2 for t in tasks)) / len(tasks)
    return -100 * sum(t["difference"] for t in tasks) / len(tasks), 100 * error


def documents_of(row: dict) -> int:
    """Return how many documents of each task a row was measured on."""
    return min(task["documents"] for task in row["tasks"].values())


def report(path: Path, command: str) -> str:
    """Return the table of the rows as Markdown, and draw the figure beside it."""
    document = json.loads(path.read_text())
    rows = sorted(document["rows"], key=lambda r: (r["dropped"], *_place(r)))
    tasks = list(rows[0]["tasks"])
    lines = [
        f"# What dropping attention syncs costs {document['model']}, TP {document['tp']}",
        "",
        f"    {command}",
        "",
        f"Measured on {document['measured']} sequences of {document['seq_len']} tokens of {document['data']} that "
        f"nothing was fitted on, and as many of {document['second']}"
        + (
            ", and on the first documents of each task, as many as the table says: accuracy in points, the paired "
            "difference to the dense model"
            if tasks
            else ""
        )
        + ". CPU seconds of one thread on a shared machine; of a distilled row those of the training alone, and with "
        "heads replicated (a rank reads up to so many per cent more of the weights) those of the choice and the "
        "second pass alone, where what comes before had its own row. Over: an interrupted run had made some of it.",
        "",
        "| dropped | method | fitted on | KL | perplexity | KL, second text | perplexity, second text"
        + "".join(f" | {t.removesuffix('_part')}" for t in tasks)
        + (" | mean | documents" if tasks else "")
        + " | weights added a rank | CPU s |",
        "|" + "---|" * (9 + len(tasks) + 2 * bool(tasks)),
    ]
    for r in rows:
        found = r["text"], r["second"]
        lines.append(
            f"| {r['dropped']} of {document['blocks']} | {r['method']}"
            + (f" ({r['steps']} steps)" if r["steps"] else "")
            + (
                f" ({100 * key_of(r)[-1]:.0f} %: blocks {', '.join(map(str, r['replicated']))})"
                if r["replicated"]
                else ""
            )
            + (
                " | "
                if r["method"] not in MAX_RANK
                else f" | {r['sequences']}" + (f", {r['trained']}" if r["steps"] else "")
            )
            + "".join(f" | {f['kl']:.3f} ± {f['kl_stderr']:.3f} | {100 * f['ppl_increase']:+.1f} %" for f in found)
            + "".join(f" | {100 * t['difference']:+.1f} ± {100 * t['stderr']:.1f}" for t in r["tasks"].values())
            + (f" | {-lost(r)[0]:+.1f} ± {lost(r)[1]:.1f} | {documents_of(r)}" if tasks else "")
            + f" | {r['predictor_weights_a_rank']:,} | {'over ' if r.get('went_on') else ''}{r['cpu_seconds']:.0f} |"
        )
    lines += ["", f"Fitted on: sequences; and, where it was distilled, those trained on. {PUBLISHED}", ""]
    if tasks:
        draw(document, rows, path.with_suffix(".png"))
        lines += [f"![Accuracy lost against attention syncs dropped]({path.stem}.png)", ""]
    return "\n".join(lines)


def draw(document: dict, rows: Sequence[dict], path: Path) -> None:
    """Draw the accuracy lost against the share of syncs dropped, a line a method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2))
    for method, more in dict.fromkeys((r["method"], key_of(r)[-1]) for r in sorted(rows, key=_place)):
        own = [r for r in rows if (r["method"], key_of(r)[-1]) == (method, more)]
        own = {r["dropped"]: r for r in own}.values()  # of several, fitted on most sequences
        points = [(0.0, 0.0, 0.0), *((100 * r["dropped"] / document["blocks"], *lost(r)) for r in own)]
        x, y, error = zip(*points, strict=True)
        axes.errorbar(x, y, error, marker="o", capsize=3, label=method + (f" ({100 * more:.0f} %)" if more else ""))
    axes.axhline(1, color="grey", linewidth=0.8, linestyle="--")
    axes.set_xlabel("attention syncs dropped (%)")
    axes.set_ylabel("accuracy lost, mean of the tasks (points)")
    axes.set_title(f"{document['model']}, TP {document['tp']}")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150, metadata={"Software": None})
