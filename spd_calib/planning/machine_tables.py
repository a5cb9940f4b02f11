"""Reading a machine's figures: a table that ships with this package, a CSV, or a hardware.json that `bench` wrote."""

import csv
import math
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from spd_calib.errors import InputError
from spd_calib.formats.files import read
from spd_calib.formats.hardware import Hardware
from spd_calib.formats.machine import AllReduce, Machine

COLUMNS = ["ranks", "bytes", "seconds", "memory_bytes_per_second", "flops_per_second"]


def shipped() -> list[str]:
    """Return the names of the tables that ship with this package."""
    return sorted(f.name.removesuffix(".json") for f in _folder().iterdir() if f.name.endswith(".json"))


def shipped_for(ranks: int) -> list[str]:
    """Return the names of those whose all-reduces were timed with so many ranks."""
    return [name for name in shipped() if _shipped(name).ranks == ranks]


def load(name: str) -> Machine | Hardware:
    """Return a shipped table by its name, what a hardware.json holds, or a CSV with COLUMNS.

    Raises InputError for anything else.
    """
    if name in shipped():
        return _shipped(name)
    path = Path(name)
    if path.suffix == ".csv":
        return _from_csv(path)
    if not path.exists() and path.suffix != ".json":
        raise InputError(f"`hardware` {name} is no file and none of {', '.join(shipped())}.")
    return read(Hardware, path)


def _shipped(name: str) -> Machine:
    return Machine.model_validate_json((_folder() / f"{name}.json").read_text(encoding="utf-8"))


def _from_csv(path: Path) -> Machine:
    """Return the table in a CSV: a row for each size; the rates of memory and arithmetic in each, which must agree."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        [(ranks, memory, rate)] = {(r["ranks"], r["memory_bytes_per_second"], r["flops_per_second"]) for r in rows}
        return Machine(
            name=path.stem,
            source=path.name,
            ranks=int(ranks),
            memory_bytes_per_second=float(memory),
            flops_per_second=float(rate),
            all_reduces=[AllReduce(bytes=int(r["bytes"]), seconds=float(r["seconds"])) for r in rows],
        )
    except OSError as e:
        raise InputError(f"{path} cannot be read: {e.strerror}.") from None
    except (KeyError, ValueError, TypeError, ValidationError):
        raise InputError(
            f"{path} is no table of all-reduces: it needs the columns {', '.join(COLUMNS)}, numbers above 0, the sizes "
            "in order, and the same ranks and rates in every row."
        ) from None


def _folder() -> Any:
    return resources.files("spd_calib.planning") / "machines"


def interpolate(table: Mapping[int, float], size: int) -> float:
    """Return the seconds at `size` bytes: on straight lines in log-log between the sizes of `table`.

    Below its least size the seconds are that size's; above its largest they grow as the bytes do.
    """
    sizes = sorted(table)
    if size <= sizes[0]:
        return table[sizes[0]]
    if size >= sizes[-1]:
        return table[sizes[-1]] * size / sizes[-1]
    i = next(i for i, s in enumerate(sizes) if s >= size)
    low, high = sizes[i - 1], sizes[i]
    share = math.log(size / low) / math.log(high / low)
    return table[low] * (table[high] / table[low]) ** share
