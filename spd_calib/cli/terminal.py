"""Printing for people, on stderr, so that stdout stays for files and pipes."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Column, Table

from spd_calib.api.progress import Progress
from spd_calib.reporting.table import numeric

console = Console(stderr=True, highlight=False)
NARROW = 80  # columns; below it, less air
EVERY_SECONDS, EVERY_SHARE = 30, 0.05  # how often a log is told how far a command is
COLOURS = {"keep_sync": "cyan", "block_drop": "green", "plain_drop": "yellow"}


def say(message: str) -> None:
    console.print(message, markup=False)


class Work:
    """A progress bar with time left; where stderr is no terminal a line now and then."""

    def __init__(self, bar: Bar, what: str, total: int | None):
        self.bar, self.task = bar, bar.add_task(what, total=total)
        self.what, self.done, self.total = what, 0, total or 0
        self.began = self.last_said = time.monotonic()
        self.done_then = 0  # when a line was last printed

    @property
    def progress(self) -> Progress:
        """Return what a call of the Python API tells this of."""
        return Progress(say=say, expect=self.expect, step=self.step)

    def expect(self, steps: int) -> None:
        """Count `steps` more that are to come."""
        self.total += steps
        self.bar.update(self.task, total=self.total)

    def step(self, note: str = "") -> None:
        self.done += 1
        self.bar.update(self.task, completed=self.done, description=f"{self.what} {note}".strip())
        if not console.is_terminal:
            self._say_now_and_then(note)

    def _say_now_and_then(self, note: str) -> None:
        """Print how far it is, every EVERY_SECONDS or EVERY_SHARE of the steps, whichever comes later."""
        now = time.monotonic()
        if now - self.last_said < EVERY_SECONDS or self.done - self.done_then < EVERY_SHARE * self.total:
            return
        self.last_said, self.done_then = now, self.done
        passed = now - self.began
        left = f", about {_minutes(passed * (self.total - self.done) / self.done)} left" if self.total else ""
        of_all = f" of {self.total}" if self.total else ""
        say(f"{self.what}: {self.done}{of_all} in {_minutes(passed)}{left}{f' ({note})' if note else ''}")


def _minutes(seconds: float) -> str:
    """Return '2 h 05 min', '3 min' or '45 s'."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"


@contextmanager
def working(what: str, total: int | None = None) -> Iterator[Work]:
    """Show how far a command is while this lasts. `total`: its steps; None where they show only on the way."""
    columns = (
        TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
        BarColumn(10 if console.width < NARROW else 30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, transient=True, expand=True, disable=not console.is_terminal) as bar:
        yield Work(bar, what, total)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """Print rows of text: the first `left` columns and those of words aligned left, numbers right.

    Where the terminal is narrow the words go to further lines, the numbers stay whole as long as there is room.
    """
    console.print(f"\n{title}", style="bold", markup=False)
    gap = 1 if console.width < NARROW else 2
    t = Table(box=None, pad_edge=False, header_style="dim", padding=(0, gap, 0, 0))
    numbers = numeric(columns, rows, left=left)
    widths = _widths(columns, rows, numbers=numbers, room=console.width - gap * (len(columns) - 1))
    for column, number, width in zip(columns, numbers, widths, strict=True):
        t.add_column(column, justify="right" if number else "left", overflow="fold", width=width)
    for row in rows:
        t.add_row(*(f"[{COLOURS[cell]}]{cell}[/]" if cell in COLOURS else cell.replace("[", "\\[") for cell in row))
    console.print(t)


def _widths(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[bool], room: int
) -> Sequence[int | None]:
    """Return each column's width, in all at most `room`; None for all where there is not enough.

    Every cell gets one line where there is room for it; else numbers and words stay whole, or at least words.
    """
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
