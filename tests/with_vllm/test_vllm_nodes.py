"""Nodes that were started with different plans, or one without: none of them serves."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import free_port
from plans import write_plan
from vllm.engine.arg_utils import EngineArgs

from spd_calib.errors import SpdError
from spd_calib.runtimes.vllm.engine import start
from spd_calib.runtimes.vllm.processes import vllm_environment

K, D = "keep_sync", "block_drop"

SAME, OTHER, NO_FILE = "a" * 64, "b" * 64, "There is no file plan.json on this node."
CASES = {
    "the same": ((SAME, None), (SAME, None), ""),
    "another": ((SAME, None), (OTHER, None), "were given 2 different plans"),
    "an error": ((SAME, None), (None, NO_FILE), NO_FILE),
    "no plan": ((SAME, None), None, "Not every rank of the tensor-parallel group has applied a plan"),
}
"""Name -> what either rank applied, or could not (None: knows of no plan), and the words in which both refuse."""

RANK = """
import json
import os
import sys
from datetime import timedelta

import torch.distributed as dist

from spd_calib.errors import InputError
from spd_calib.runtimes.agreement import check_agreement

rank, port, cases = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
said = []
for case in cases:
    group = dist.new_group([0, 1], backend="gloo")
    try:
        if case is None:  # goes on to a collective of its own
            dist.all_gather_object([None, None], "something else", group=group)
        else:
            check_agreement(group, applied=case[0], error=case[1], wait=timedelta(seconds=3))
        said.append("")
    except (InputError, RuntimeError) as e:
        said.append(str(e))
print(json.dumps(said), flush=True)
os._exit(0)  # what a lost rank leaves of gloo's threads may abort an ordinary end
"""

NODE = """
import sys

from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins

if __name__ == "__main__":
    load_general_plugins()
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor

    folder, plan, node, port = sys.argv[1:]
    args = EngineArgs(
        model=folder, tensor_parallel_size=2, max_model_len=64, dtype="float32", enforce_eager=True, nnodes=2,
        node_rank=int(node), master_addr="127.0.0.1", master_port=int(port), distributed_executor_backend="mp",
        additional_config={"spd_plan": plan} if plan else {},
    )
    executor = MultiprocExecutor(args.create_engine_config(headless=node == "1"), monitor_workers=False)
    print("both loaded")
    executor.shutdown()
"""


@contextmanager
def both(tmp_path: Path, script: str, *arguments: list) -> Iterator[list[tuple[subprocess.Popen, Path]]]:
    """Two processes that were given these arguments, and the files of their output; ended afterwards."""
    file = tmp_path / "script.py"
    file.write_text(script)
    started = []
    with vllm_environment(2):
        environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        for i, line in enumerate(arguments):
            command, log = [sys.executable, str(file), *map(str, line)], tmp_path / f"{i}.log"
            with log.open("w") as out:
                process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
            started.append((process, log))
    try:
        yield started
    finally:
        for process, _ in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_ranks_agree_or_refuse(tmp_path):
    port = free_port()
    of_ranks = [json.dumps([case[rank] for case in CASES.values()]) for rank in range(2)]
    with both(tmp_path, RANK, *([rank, port, cases] for rank, cases in enumerate(of_ranks))) as started:
        assert [process.wait(240) for process, _ in started] == [0, 0], [log.read_text() for _, log in started]
        first, second = (json.loads(log.read_text().splitlines()[-1]) for _, log in started)
    for case, at_first, at_second in zip(CASES.values(), first, second, strict=True):
        assert case[2] in at_first and bool(case[2]) == bool(at_first)
        assert case[1] is None or (case[2] in at_second and bool(case[2]) == bool(at_second))


def test_two_nodes_with_different_plans_refuse_to_start(folder_of, tmp_path):
    folder, port, words = folder_of("llama"), free_port(), "were given 2 different plans"
    plans = [write_plan(tmp_path / f"{i}.json", folder, 2, [K, K, K, D][i:] + [K] * i) for i in range(2)]
    with both(tmp_path, NODE, *([folder, plan, i, port] for i, plan in enumerate(plans))) as started:
        for process, log in started:
            waited = 0
            while words not in log.read_text() and process.poll() is None and waited < 300:
                time.sleep(1)
                waited += 1
            assert words in log.read_text() and "both loaded" not in log.read_text()


def test_a_named_worker_without_the_plugin_ends_the_start(folder_of, monkeypatch):
    """And what is reported is the worker's own sentence, not the death of the engine that followed."""
    create = EngineArgs.create_engine_config
    monkeypatch.setattr(EngineArgs, "create_engine_config", getattr(create, "__wrapped__", create))
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    named = "spd_calib.runtimes.vllm.cpu_worker.PlannedCPUWorker"
    began = "vLLM did not start: This worker runs plans, but its configuration holds none that was checked"
    with pytest.raises(SpdError, match=began), start(folder_of("llama"), tp=2, max_length=64, worker_cls=named):
        pass
