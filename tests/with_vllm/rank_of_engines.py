"""One rank of vLLM engines that are started one after the other in this process, each with its plan.

Usage: rank_of_engines.py JOBS OUT; vLLM's external launcher finds its rank in torchrun's environment variables.
Starting a process costs far more here than starting an engine, so the tests of many architectures share two.
"""

import json
import sys
from pathlib import Path

from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

from spd_calib.formats.drops import NOTHING_DROPPED
from spd_calib.runtimes.vllm.engine import start

distributed_args = ExecutorWithExternalLauncher._distributed_args


def main(jobs: Path, out: Path) -> None:
    found = {}
    for name, job in json.loads(jobs.read_text()).items():
        # vLLM names its shared memory after this, and "env://" would be the same for every engine on this machine
        place = f"file://{jobs.parent}/vllm_dist_{jobs.parent.name}_{name}"
        ExecutorWithExternalLauncher._distributed_args = lambda self, place=place: (place, *distributed_args(self)[1:])
        options = {"distributed_executor_backend": "external_launcher", "max_num_seqs": 8}
        try:
            with start(Path(job["folder"]), tp=2, max_length=64, plan=Path(job["plan"]), **options) as engine:
                run = {"vocabulary": [[part.start, part.stop] for part in engine.vocabulary()]}
                run["planned"] = engine.observe(job["prompts"], new_tokens=job["new"]).model_dump()
                engine.set(NOTHING_DROPPED)
                run["dense"] = engine.observe(job["prompts"], new_tokens=job["new"]).model_dump()
        except Exception as e:
            run = {"error": f"{type(e).__name__}: {e}; {e.__cause__}"}
        found[name] = run
        out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
