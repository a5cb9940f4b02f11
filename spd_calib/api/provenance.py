"""The provenance of a document: the command or the call, and the versions of what ran."""

import shlex
import sys
from pathlib import Path

from spd_calib.formats.common import Provenance
from spd_calib.parallel.session import versions

from .options import RunOptions


def provenance(run: RunOptions) -> Provenance:
    """Return the provenance of a document made now with these (resolved) options: by spd-calib's own command line, if
    this process runs it, else from Python."""
    return Provenance(command=_command(), seed=run.seed, device=run.device, dtype=run.dtype, versions=versions())  # type: ignore[arg-type]


def _command() -> str:
    program = Path(sys.argv[0])
    ours = program.name == "spd-calib" or program.parts[-2:] == ("spd_calib", "__main__.py")
    return shlex.join(["spd-calib", *sys.argv[1:]]) if ours else "from Python"
