"""The check as a user runs it, the compiled engine, and streams that stay bit-equal over a long generation."""

import os

import pytest
import tiny
from conftest import build
from plans import write_plan

from spd_calib.formats.common import Strategy
from spd_calib.formats.files import read
from spd_calib.formats.plan import Plan
from spd_calib.parallel.compensation import load_compensation
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.runtimes.checks import compare_logprobs
from spd_calib.runtimes.vllm.check import TOLERANCE, run, simulate
from spd_calib.runtimes.vllm.engine import start

K, D, P = "keep_sync", "block_drop", "plain_drop"


def vllm_files() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith("vllm_dist_")}


def test_check_of_a_plan(folder_of, tmp_path):
    """From the file to the table: the plan goes through additional_config, and nothing is left behind."""
    before, host = vllm_files(), os.environ.get("VLLM_HOST_IP")
    kinds = ["full", None, None, "low_rank"]
    plan = write_plan(tmp_path / "plan.json", folder_of("llama_bias"), 2, [D, K, D, D], [K, D, K, K], kinds)
    rows = run(plan, ["the cat saw a bird near the river .", "one two three"], new_tokens=8)
    assert [row for row in rows if not row.ok] == []
    assert [row.expected for row in rows if "all-reduces" in row.what] == ["5", "9"]
    assert vllm_files() <= before and os.environ.get("VLLM_HOST_IP") == host


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_compiled_engine_runs_the_plan(folder_of, tmp_path, family):
    """torch.compile traces the planned layers like any other (and the all-reduces too: only eager ones are counted)."""
    attention, mlp, kinds = [D, P, K, D], [K, D, K, K], ["low_rank", None, None, "full"]
    plan = write_plan(tmp_path / "plan.json", folder_of(family), 2, attention, mlp, kinds)
    prompts = [tiny.tokens(1, n, seed=n)[0].tolist() for n in (20, 7)]
    with start(folder_of(family), 2, 64, plan, enforce_eager=False) as engine:
        seen = engine.see(prompts, 6)
    lm = TensorParallelLM.simulated(build(family), 2)
    lm.head.rows = [slice(*part) for part in seen.vocabulary]  # vLLM pads the vocabulary before it cuts it
    lm.set_strategies([Strategy(s) for s in attention], [Strategy(s) for s in mlp])
    lm.set_compensation(load_compensation(read(Plan, plan), plan))
    simulated = simulate(lm, prompts, seen.tokens)
    assert compare_logprobs("prompt", simulated.prompt, seen.prompt, TOLERANCE).ok


def test_streams_stay_bit_equal_in_bfloat16(tmp_path):
    """After every block of 512 decoded tokens, without a plain drop; with one they differ from its block on."""
    folder = tiny.save(build("llama", positions=1024), tmp_path / "long")
    prompts, extension = [tiny.tokens(1, 16)[0].tolist()], "streams_extension.StreamsExtension"
    with start(folder, 2, 560, dtype="bfloat16", worker_extension_cls=extension) as engine:
        attention, mlp = [K, D, D, D], [D, K, D, K]
        engine.set(attention, mlp)
        engine._call("spd_watch", mlp)
        assert len(engine.see(prompts, 512).tokens[0]) == 512
        first, second = engine._call("spd_streams")
        assert first == second
        engine.set([K, P, K, K])
        engine._call("spd_watch", [K] * 4)
        engine.see(prompts, 4)
        first, second = (streams["layers"] for streams in engine._call("spd_streams"))
        assert first[0] == second[0]
        assert all(a != b for a, b in zip(first[1:], second[1:], strict=True))
