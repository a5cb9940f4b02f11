"""The program of each rank in a bench that started its ranks itself.

torchrun --nproc-per-node N -m spd_calib.runtimes.torchrun.bench_worker JOB.json HARDWARE.json
"""

import sys
from pathlib import Path

from spd_calib.formats.files import dumps, write_text
from spd_calib.parallel.ending import ending_together

from .bench import BenchJob, run


def _ignore(_: object) -> None:
    """Do nothing: nobody watches the ranks' progress."""


def main() -> None:
    with ending_together():
        job = BenchJob.model_validate_json(Path(sys.argv[1]).read_text())
        write_text(Path(sys.argv[2]), dumps(run(job, expect=_ignore, tick=_ignore)))


if __name__ == "__main__":
    main()
