"""What a person would see: commands run in a forked process whose stderr is a pseudo-terminal, and stdout a pipe."""

import fcntl
import os
import pty
import re
import struct
import sys
import termios
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from spd_calib.cli import main, terminal

WIDTH = 60
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass(frozen=True)
class Shown:
    code: int
    out: str
    raw: str  # what the terminal got

    @property
    def lines(self) -> list[str]:
        """As they would stand on the screen, those that a progress bar redraws among them."""
        return [line.rstrip() for line in re.split(r"\r\n|\r|\n", ESCAPE.sub("", self.raw))]

    @property
    def tables(self) -> str:
        return "\n".join(line for line in self.lines if "━" not in line)


def on_terminal(call: Callable[[], object], width: int = WIDTH, **environment: str) -> Shown:
    """Run `call` in a forked process on a terminal of `width` columns."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
                os.environ.pop(name, None)
            os.environ |= {"TERM": "xterm-256color", **environment}
            for source, target in ((slave, 0), (writing, 1), (slave, 2)):
                os.dup2(source, target)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            terminal.console.__init__(stderr=True, highlight=False)  # type: ignore[misc]
            code = call() or 0  # type: ignore[assignment]
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(slave)
    os.close(writing)
    raw, out = _drain(master), _drain(reading)
    return Shown(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), out, raw)


def _drain(descriptor: int) -> str:
    parts = []
    while True:
        try:
            part = os.read(descriptor, 65536)
        except OSError:  # the terminal's other end is closed
            break
        if not part:
            break
        parts.append(part)
    os.close(descriptor)
    return b"".join(parts).decode()


def command(*words: object) -> Callable[[], object]:
    def call() -> None:
        sys.argv = ["spd-calib", *map(str, words)]
        main.main()

    return call
