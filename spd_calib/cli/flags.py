"""The names of parameters in an error, as the flags that a person at the terminal types."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from typer.core import TyperCommand, TyperOption

from spd_calib.errors import SpdError

OTHER_NAMES = {"strategies": "strategy", "prompts": "prompt", "names": "tasks"}
"""Parameters of the Python API whose option is called otherwise."""


@contextmanager
def naming_flags(command: TyperCommand, others: Iterable[TyperCommand] = ()) -> Iterator[None]:
    """Let an SpdError that passes name the command's options where it names parameters of the Python API.

    What is no option of the command's own may be one of `others`: a plan may ask to profile again with another.
    """
    try:
        yield
    except SpdError as e:
        flags: dict[str, str] = {}
        for known in (*others, command):  # its own have the last word
            flags |= flags_of(known)
        e.args = (with_flags(str(e), flags),)
        raise


def flags_of(command: TyperCommand) -> dict[str, str]:
    """Return the flag of each option of a command, by the name of the parameter: 'seq_len' is '--seq-len'."""
    options = [p for p in command.params if isinstance(p, TyperOption) and p.name]
    flags = {str(p.name): max(p.opts, key=len) for p in options}
    return flags | {name: flags[own] for name, own in OTHER_NAMES.items() if own in flags and name not in flags}


def with_flags(message: str, flags: Mapping[str, str]) -> str:
    """Return the message with flags in place of parameters.

    A name of one word, such as data, may be just a word: it counts as a parameter between backticks alone. One with an
    underscore counts wherever it stands by itself, and not within a path, a quotation or a longer name.
    """

    def quoted(found: re.Match) -> str:
        return flags.get(found[1], found[0])

    def bare(found: re.Match) -> str:
        return flags.get(found[0], found[0])

    message = re.sub(r"`(\w+)`", quoted, message)
    return re.sub(r"(?<![\w/.'\"`-])[a-z]\w*_\w+(?![\w/'\"`-]|\.\w)", bare, message)
