"""spd-calib diff: two profiles or two plans, side by side."""

from pathlib import Path
from typing import Annotated

import typer

from .options import COMMON, Recipe


def register(app: typer.Typer) -> None:
    app.command("diff", epilog="Example: spd-calib diff profile.json other-profile.json")(diff)


def diff(
    a: Annotated[Path, typer.Argument(help="A profile or a plan.")],
    b: Annotated[Path, typer.Argument(help="Another of the same kind.")],
    *,
    json: Annotated[bool, typer.Option("--json", help="all of it on stdout", rich_help_panel=COMMON)] = False,
    recipe: Recipe = None,
) -> None:
    """Say what differs between two profiles or two plans, and why; of two texts, whether the data matters.

    The exit code is 0 wherever the two can be compared, alike or not.
    """
    from dataclasses import asdict
    from json import dumps

    from spd_calib.api.diff import diff as compare
    from spd_calib.reporting.diff import ProfileDiff

    from .terminal import print_json, say

    found = compare(a, b)
    say(f"A: {a}\nB: {b}")
    if isinstance(found, ProfileDiff):
        _print_profiles(found)
    else:
        _print_plans(found)
    for sentence in found.answer:
        say(sentence)
    if json:
        print_json(dumps(asdict(found), indent=1) + "\n")


def _print_differing(title: str, rows) -> None:
    from .terminal import say, table

    if rows:
        table(title, ["", "A", "B"], [[r.what, r.a, r.b] for r in rows], left=3)
    else:
        say(f"{title}: nothing")


def _print_profiles(found) -> None:
    from spd_calib.reporting.agreement import measured
    from spd_calib.reporting.tables import NAMES

    from .terminal import say, table

    _print_differing("what differs in what was measured", found.differing)
    for g in found.agreements:
        rows = [
            [
                str(r.block),
                measured(r.a, r.a_stderr),
                measured(r.b, r.b_stderr),
                *(
                    ["" if r.apart is None else f"{r.apart:+.1f}{' *' if r.beyond else ''}"]
                    if found.p is not None
                    else []
                ),
                f"{r.a_rank}" if r.a_rank == r.b_rank else f"{r.a_rank} -> {r.b_rank}",
            ]
            for r in g.rows
        ]
        apart = ["apart, s.e."] if found.p is not None else []
        table(f"{NAMES[g.sync_point]}: {g.strategy}, KL alone", ["block", "A", "B", *apart, "rank"], rows)
        if found.p is not None:
            beyond = sum(r.beyond for r in g.rows)
            say(
                f"more than 2 standard errors apart (*): {beyond} of {len(g.rows)}; by chance alone it would be "
                f"{g.beyond_by_chance:.1f}"
            )
        if g.spearman is not None:
            within = ""
            if g.spearman_range is not None:
                within = f" ({g.spearman_range[0]:.2f} to {g.spearman_range[1]:.2f} within the errors)"
            say(f"rank correlation: Spearman {g.spearman:.2f}{within}, Kendall {g.kendall:.2f}")
        for sentence in g.changed:
            say(sentence)
    say("")


def _print_plans(found) -> None:
    from spd_calib.reporting.tables import names

    from .terminal import say, table

    def kl(value: float | None) -> str:
        return "" if value is None else f"{value:.3g}"

    _print_differing("what differs around the plans", found.differing)
    _print_differing("the whole plans", found.whole)
    if found.strategies:
        points = names([s.point for s in found.strategies])
        table(
            "sync points that are treated differently",
            ["block", "A", "B", "KL alone, A", "B"],
            [[name, s.a, s.b, kl(s.a_kl), kl(s.b_kl)] for name, s in zip(points, found.strategies, strict=True)],
            left=3,
        )
        for name, s in zip(points, found.strategies, strict=True):
            say(f"block {name}: A: {s.a_reason}; B: {s.b_reason}")
    say("")
