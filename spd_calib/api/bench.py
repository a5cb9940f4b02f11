"""Timing, on real ranks, what a sync costs on this machine and what a plan saves."""

import tempfile
from pathlib import Path

from spd_calib.errors import InputError
from spd_calib.formats.files import read
from spd_calib.formats.hardware import Hardware
from spd_calib.formats.plan import Plan
from spd_calib.ranks import world_size
from spd_calib.runtimes.torchrun.bench import BenchJob, BenchSettings
from spd_calib.runtimes.torchrun.bench import run as bench_on_this_rank
from spd_calib.runtimes.torchrun.launch import torchrun

from .opening import named_by, place_of
from .options import RunOptions
from .progress import SILENT, Progress
from .provenance import provenance

WORKER = "spd_calib.runtimes.torchrun.bench_worker"


def bench(
    plan: Path | str,
    *,
    model: Path | str | None = None,
    settings: BenchSettings = BenchSettings(),
    run: RunOptions = RunOptions(),
    progress: Progress = SILENT,
) -> Hardware:
    """Time all-reduces by size, prefill and decode (dense, plan, every block dropped) at the plan's TP size.

    Starts torchrun on this machine; in a process that torchrun started all ranks call this at once, and each returns
    the same.

    Args:
        plan: the path of its file.
        model: where the model is (default: where the plan says).
        settings: how much is timed.
        run: device and dtype (default: the plan's).
        progress: callbacks, told how far it is; silent where torchrun is started.

    Raises:
        InputError: the plan is for one rank, or plan or model cannot be used.
        SpdError: a rank fails.
    """
    path = Path(plan)
    document = read(Plan, path)
    tp = document.tensor_parallel.size
    if tp == 1:
        raise InputError("The plan is for one rank, which has nothing to sync; profile with a larger `tp`.")
    resolved = run.resolved(document.provenance.dtype)
    job = BenchJob(
        plan=path.absolute(),
        model=named_by(document.model, path) if model is None else place_of(str(model)),
        settings=settings,
        device=resolved.device,
        dtype=str(resolved.dtype),
        provenance=provenance(resolved),
    )
    if world_size() > 1:
        return bench_on_this_rank(job, expect=progress.expect, tick=progress.step)
    with tempfile.TemporaryDirectory() as folder:
        job_file, found_file = Path(folder, "job.json"), Path(folder, "hardware.json")
        job_file.write_text(job.model_dump_json())
        torchrun(tp, WORKER, arguments=[str(job_file), str(found_file)])
        return read(Hardware, found_file)
