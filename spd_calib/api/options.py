"""Options that several calls share."""

import operator
from dataclasses import dataclass, replace
from typing import Any

from spd_calib.errors import InputError

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class RunOptions:
    """The device, dtype and batch size that a model runs with, and the seed.

    `dtype` None is that of the file that is read, or float32; `device` auto is a GPU if there is one. `stream` reads
    each block's weights from disk when the block is to run.
    """

    device: str = "auto"
    dtype: str | None = None
    batch_size: int = 8
    seed: int = 0
    stream: bool = False

    def resolved(self, dtype: str = "float32") -> "RunOptions":
        """Return the options with a device and a dtype that say what they are; `dtype` where none was given.

        Raises InputError for a dtype that is none of DTYPES, a batch size below 1, and a seed that is too large.
        """
        import torch

        whole_number("batch_size", self.batch_size, least=1)
        chosen = self.dtype or dtype
        if chosen not in DTYPES:
            raise InputError(f"`dtype` {chosen!r} is none of {', '.join(DTYPES)}.")
        if not -(2**63) <= self.seed < 2**63:
            raise InputError(f"`seed` {self.seed} is no number of 64 bits; give a smaller one.")
        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return replace(self, device=str(device), dtype=chosen)


def whole_number(name: str, value: Any, *, least: int) -> int:
    """Return what was given for the option `name` as an int, a number of numpy's, too.

    Raises InputError for what is no whole number, or is below `least`.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise InputError(f"`{name}` {value!r} is no whole number; give one.") from None
    if number < least:
        raise InputError(f"`{name}` {number} is too small; give {least} or more.")
    return number


def check_whole_numbers(least: int, **given: Any) -> None:
    """Raise InputError where an option, by its name, was given what whole_number refuses; None stands for not given."""
    for name, value in given.items():
        if value is not None:
            whole_number(name, value, least=least)
