"""One rank of vLLM engines that are started one after the other in this process, each with its plan.

Usage: rank_of_engines.py JOBS OUT; vLLM's external launcher finds its rank in torchrun's environment variables.
Starting a process costs far more here than starting an engine, so the tests of many architectures share two.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import torchvision_on_a_cpu  # noqa: F401  # before vLLM

# isort: split
import delta_in_float32
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.utils import default_unquantized_gemm
from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

from spd_calib.formats.drops import NOTHING_DROPPED
from spd_calib.runtimes.projections import Projection
from spd_calib.runtimes.vllm.engine import start
from spd_calib.runtimes.vllm.mixtures import Mixture

distributed_args = ExecutorWithExternalLauncher._distributed_args


@contextmanager
def as_on_a_gpu(run: dict) -> Iterator[None]:
    """Have vLLM leave weights unpacked, and torch multiply by them, while this lasts; then say what was in place."""
    in_place, onto = set(), Projection.onto

    def recorded(self, p, z):
        if p is not None:
            in_place.add(self.in_place)
        return onto(self, p, z)

    by_torch = patch.object(linear, "dispatch_unquantized_gemm", lambda _: default_unquantized_gemm)
    unpacked = patch.object(linear.UnquantizedLinearMethod, "process_weights_after_loading", lambda *_: None)
    with by_torch, unpacked, patch.object(Projection, "onto", recorded):
        yield
    run["in_place"] = sorted(in_place)


def routing_apart():
    """Have each rank's routers read what its experts read, while this lasts."""
    fed = Mixture.fed
    return patch.object(Mixture, "fed", lambda self, u, shared, deferred: fed(self, u, u, deferred=deferred))


def main(jobs: Path, out: Path) -> None:
    delta_in_float32.install()
    found = {}
    for name, job in json.loads(jobs.read_text()).items():
        # vLLM names its shared memory after this, and "env://" would be the same for every engine on this machine
        place = f"file://{jobs.parent}/vllm_dist_{jobs.parent.name}_{name}"
        ExecutorWithExternalLauncher._distributed_args = lambda self, place=place: (place, *distributed_args(self)[1:])
        options = {"distributed_executor_backend": "external_launcher", "max_num_seqs": 8, **job.get("options", {})}
        try:
            run: dict = {}
            with (
                as_on_a_gpu(run) if job["as_on_a_gpu"] else nullcontext(),
                routing_apart() if job.get("route_apart") else nullcontext(),
                start(Path(job["folder"]), tp=2, max_length=64, plan=Path(job["plan"]), **options) as engine,
            ):
                run["vocabulary"] = [[part.start, part.stop] for part in engine.vocabulary()]
                run["planned"] = engine.observe(job["prompts"], new_tokens=job["new"]).model_dump()
                run["samples"] = [
                    engine.observe(job["prompts"], new_tokens=job["new"], seed=seed).model_dump()
                    for seed in range(job.get("rounds", 0))
                ]
                engine.set(NOTHING_DROPPED)
                run["dense"] = engine.observe(job["prompts"], new_tokens=job["new"]).model_dump()
        except Exception as e:
            run = {"error": f"{type(e).__name__}: {e}; {e.__cause__}"}
        found[name] = run
        out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
