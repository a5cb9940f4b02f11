"""The server with a plan, as a user starts it: what it answers over HTTP is what the simulation says.

`python -m vllm.entrypoints.openai.api_server` is the server of `vllm serve`, whose command line stumbles here over the
other name that the CPU build was published under.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import tiny
from conftest import build
from plans import write_plan

from spd_calib.formats.drops import NOTHING_DROPPED
from spd_calib.models.plan_files import load_plan
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.runtimes.checks import compare_logprobs
from spd_calib.runtimes.simulation import simulate
from spd_calib.runtimes.vllm.check import TOLERANCE
from spd_calib.runtimes.vllm.processes import remove_shared_memory, vllm_environment

K, D = "keep_sync", "block_drop"
SERVER = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]


@pytest.fixture
def serve(tmp_path):
    """Starts a server on loopback; a function of the model folder and options: (port, process, log)."""
    started = []

    def start(folder: Path, *options: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [*SERVER, "--model", folder, "--host", "127.0.0.1", "--port", port, "--dtype", "float32"]
        command += ["--enforce-eager", "--max-model-len", 64, "--logprobs-mode", "raw_logprobs", *options]
        log = tmp_path / "serve.log"
        with vllm_environment(2), log.open("w") as out:
            process = subprocess.Popen(list(map(str, command)), stdout=out, stderr=out, start_new_session=True)
        started.append(process)
        return port, process, log

    before = {name for name in os.listdir("/dev/shm") if name.startswith("vllm_dist_")}
    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    remove_shared_memory({name for name in os.listdir("/dev/shm") if name.startswith("vllm_dist_")} - before)


def ask(port: int, path: str, body: dict | None = None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read()


def wait_until_up(port: int, process: subprocess.Popen, log: Path, seconds: int = 300) -> None:
    for _ in range(2 * seconds):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            ask(port, "/health")
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])


def test_a_server_answers_by_the_plan(folder_of, tmp_path, serve):
    folder = folder_of("llama")
    attention, mlp = [D, K, D, D], [K, D, K, K]
    path = write_plan(tmp_path / "plan.json", folder, 2, attention, mlp, ["mean", None, "low_rank", "full"])
    additional = json.dumps({"spd_plan": str(path)})
    port, process, log = serve(folder, "--tensor-parallel-size", 2, "--additional-config", additional)
    wait_until_up(port, process, log)
    prompt, new = tiny.tokens(1, 12, seed=3)[0].tolist(), 6
    body = {"model": str(folder), "prompt": prompt, "max_tokens": new, "temperature": 0, "logprobs": 0}
    body |= {"return_tokens_as_token_ids": True, "ignore_eos": True, "return_token_ids": True}
    choice = json.loads(ask(port, "/v1/completions", body))["choices"][0]
    tokens = [int(t.removeprefix("token_id:")) for t in choice["logprobs"]["tokens"]]
    assert len(tokens) == new
    lm, found = TensorParallelLM.simulated(build("llama"), 2), [choice["logprobs"]["token_logprobs"]]
    planned = simulate(lm, [prompt], continuations=[tokens], drops=load_plan(path)[1])
    dense = simulate(lm, [prompt], continuations=[tokens], drops=NOTHING_DROPPED)
    assert compare_logprobs("served", planned.chosen, found=found, tolerance=TOLERANCE).ok
    assert not compare_logprobs("dense", dense.chosen, found=found, tolerance=TOLERANCE).ok


def test_a_server_refuses_a_plan_of_another_tp_size(folder_of, tmp_path, serve):
    folder = folder_of("llama")
    path = write_plan(tmp_path / "plan.json", folder, 4, [D, K, K, K])
    _, process, log = serve(
        folder, "--tensor-parallel-size", 2, "--additional-config", json.dumps({"spd_plan": str(path)})
    )
    assert process.wait(120) != 0
    assert "is for TP 4, but vLLM was started with TP 2" in log.read_text()
