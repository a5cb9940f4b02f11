"""Timing, on real ranks, what a sync costs on this machine and what a plan saves."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from spd_calib.errors import InputError
from spd_calib.formats.files import read
from spd_calib.formats.hardware import Hardware
from spd_calib.formats.plan import Plan
from spd_calib.ranks import world_size
from spd_calib.runtimes.bench import BenchSettings
from spd_calib.runtimes.torchrun.bench import BenchJob
from spd_calib.runtimes.torchrun.bench import run as bench_on_this_rank
from spd_calib.runtimes.torchrun.launch import torchrun

from .check import Runtime
from .opening import open_model_of, place_of, place_of_own
from .options import RunOptions
from .progress import SILENT, Progress
from .provenance import provenance

WORKER = "spd_calib.runtimes.torchrun.bench_worker"


def bench(
    plan: Path | str,
    *,
    runtime: Runtime = "torchrun",
    model: Path | str | None = None,
    as_served: Sequence[str] = (),
    settings: BenchSettings = BenchSettings(),
    run: RunOptions = RunOptions(),
    progress: Progress = SILENT,
) -> Hardware:
    """Time all-reduces by size, prefill and decode (dense, plan, every block dropped) at the plan's TP size.

    On torchrun, transformers' own modules, eager: starts it on this machine; in a process that torchrun started all
    ranks call this at once, and each returns the same. In vLLM, engines as they are served.

    Args:
        plan: the path of its file.
        runtime: 'torchrun' or 'vllm', which must be installed.
        model: where the model is (default: where the plan says).
        as_served: with vllm, arguments of `vllm serve`, which make the engines.
        settings: how much is timed.
        run: device and dtype (default: the plan's) on torchrun; vLLM's are those of `as_served`.
        progress: callbacks, told how far it is; silent where torchrun is started.

    Raises:
        InputError: the plan is for one rank, or plan, model or arguments cannot be used.
        SpdError: a rank or an engine fails.
    """
    if runtime not in ("torchrun", "vllm"):
        raise InputError(f"`runtime` {runtime!r} is neither torchrun nor vllm.")
    if as_served and runtime != "vllm":
        raise InputError("`as_served` are the arguments of an engine of vLLM's; give `runtime` vllm with them.")
    for name, given in (("plan", plan), ("model", model)):
        if given is not None and not isinstance(given, str | Path):
            raise InputError(f"Ranks and engines read the {name} from disk; give its path as `{name}`.")
    path = Path(plan)
    document = read(Plan, path)
    tp = document.tensor_parallel.size
    if tp == 1:
        raise InputError("The plan is for one rank, which has nothing to sync; profile with a larger `tp`.")
    resolved = run.resolved(document.provenance.dtype)
    if runtime == "vllm":
        from spd_calib.runtimes.vllm.bench import bench_vllm

        return bench_vllm(
            open_model_of(document, path=path, model=model),
            path.absolute(),
            document,
            settings=settings,
            arguments=as_served,
            provenance=provenance(resolved),
            expect=progress.expect,
            tick=progress.step,
        )
    job = BenchJob(
        plan=path.absolute(),
        model=place_of_own(document, path) if model is None else place_of(str(model)),
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
