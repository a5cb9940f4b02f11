"""What a person sees: on stderr, so that stdout stays for files and pipes."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

from spd_calib.report.table import numeric

console = Console(stderr=True, highlight=False)
NARROW = 80  # columns; below it, less air
COLOURS = {"keep_sync": "cyan", "block_drop": "green", "plain_drop": "yellow"}


def say(message: str) -> None:
    console.print(message, markup=False)


class Work:
    """A progress bar with time left; nothing where stderr is no terminal."""

    def __init__(self, progress: Progress, what: str, total: int | None):
        self.progress, self.task = progress, progress.add_task(what, total=total)
        self.what, self.done, self.total = what, 0, total or 0

    def expect(self, steps: int) -> None:
        """So many more steps are to come than were known of."""
        self.total += steps
        self.progress.update(self.task, total=self.total)

    def step(self, note: str = "") -> None:
        self.done += 1
        self.progress.update(self.task, completed=self.done, description=f"{self.what} {note}".strip())


@contextmanager
def working(what: str, total: int | None = None) -> Iterator[Work]:
    """`total`: the steps there will be; None where that shows only on the way."""
    columns = (
        TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
        BarColumn(10 if console.width < NARROW else 30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, expand=True, disable=not console.is_terminal) as progress:
        yield Work(progress, what, total)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """Print rows of text: the first `left` columns and those of words aligned left, numbers right.

    Where the terminal is narrow the words go to further lines, the numbers stay whole as long as there is room.
    """
    console.print(f"\n{title}", style="bold", markup=False)
    gap = 1 if console.width < NARROW else 2
    t = Table(box=None, pad_edge=False, header_style="dim", padding=(0, gap, 0, 0))
    numbers = numeric(columns, rows, left)
    widths = _widths(columns, rows, numbers, console.width - gap * (len(columns) - 1))
    for column, number, width in zip(columns, numbers, widths, strict=True):
        t.add_column(column, justify="right" if number else "left", overflow="fold", width=width)
    for row in rows:
        t.add_row(*(f"[{COLOURS[cell]}]{cell}[/]" if cell in COLOURS else cell.replace("[", "\\[") for cell in row))
    console.print(t)


def _widths(
    columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[bool], room: int
) -> Sequence[int | None]:
    """Of each column, in all at most `room`: everything on one line, else numbers and words whole, else words alone."""
    everything = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    if sum(everything) <= room:
        return everything
    words = [max(len(w) for c in cells for w in c.split() or [""]) for cells in zip(columns, *rows, strict=True)]
    figures = [max(map(len, cells)) for cells in zip(*rows, strict=True)] or words
    for least in ([max(w, f if number else 0) for w, f, number in zip(words, figures, numbers, strict=True)], words):
        if (spare := room - sum(least)) >= 0:
            for i in sorted(range(len(least)), key=lambda i: everything[i] - least[i]):
                more = min(spare, everything[i] - least[i])
                least[i], spare = least[i] + more, spare - more
            return least
    return [None] * len(columns)


def print_json(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
