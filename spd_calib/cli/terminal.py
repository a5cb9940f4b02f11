"""What a person sees: on stderr, so that stdout stays for files and pipes."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

console = Console(stderr=True, highlight=False)
COLOURS = {"keep_sync": "cyan", "block_drop": "green", "plain_drop": "yellow"}


def say(message: str) -> None:
    console.print(message, markup=False)


class Work:
    """A progress bar with time left; where stderr is no terminal, its first and last line."""

    def __init__(self, progress: Progress, what: str, total: int | None):
        self.progress, self.task = progress, progress.add_task(what, total=total)
        self.what = what

    def step(self, note: str = "") -> None:
        self.progress.update(self.task, advance=1, description=f"{self.what} {note}".strip())


@contextmanager
def working(what: str, total: int | None) -> Iterator[Work]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield Work(progress, what, total)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """Print rows of text: the first `left` columns and the last aligned left, numbers between them right."""
    console.print(f"\n{title}", style="bold", markup=False)
    t = Table(box=None, pad_edge=False, header_style="dim")
    for i, column in enumerate(columns):
        words = i < left or not any(row[i][:1] in "+-0123456789" for row in rows if row[i])
        t.add_column(column, justify="left" if words else "right", overflow="fold")
    for row in rows:
        t.add_row(*(f"[{COLOURS[cell]}]{cell}[/]" if cell in COLOURS else cell.replace("[", "\\[") for cell in row))
    console.print(t)


def print_json(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
