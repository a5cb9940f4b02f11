"""The check as a user runs it, the compiled engine, and streams that stay bit-equal over a long generation."""

import os

import pytest
import tiny
from conftest import build
from plans import write_plan
from vllm import SamplingParams

from spd_calib.api.check import check
from spd_calib.errors import InputError
from spd_calib.formats.drops import Drops
from spd_calib.models.plan_files import load_plan
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.runtimes.checks import compare_logprobs
from spd_calib.runtimes.simulation import simulate
from spd_calib.runtimes.vllm.check import TOLERANCE
from spd_calib.runtimes.vllm.engine import start

K, D, P = "keep_sync", "block_drop", "plain_drop"


def vllm_files() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith("vllm_dist_")}


def test_check_of_a_plan(folder_of, tmp_path):
    """From the file to the table: the plan goes through additional_config, and nothing is left behind."""
    before, host = vllm_files(), os.environ.get("VLLM_HOST_IP")
    kinds = ["full", None, None, "low_rank"]
    plan = write_plan(tmp_path / "plan.json", folder_of("llama_bias"), 2, [D, K, D, D], [K, D, K, K], kinds)
    prompts = ["the cat saw a bird near the river .", "one two three"]
    result = check(plan, runtime="vllm", prompts=prompts, new_tokens=8)
    assert result.wrong == []
    assert [row.expected for row in result.rows if "forward and rank" in row.what] == ["5", "9"]
    assert vllm_files() <= before and os.environ.get("VLLM_HOST_IP") == host


def test_check_of_the_engine_that_is_served(folder_of, tmp_path):
    """Compiled and in bfloat16; and the engine of another plan, whose drops are at other places, does not pass."""
    kinds, folder = ["low_rank", None, None, "full"], folder_of("llama")
    plan = write_plan(tmp_path / "plan.json", folder, 2, [D, P, K, D], [K, D, K, K], kinds)
    prompts = ["the cat saw a bird near the river .", "one two three", "anna took a red ball and a lamp"]
    arguments = ["--dtype", "bfloat16", "--max-model-len", "64"]
    result = check(plan, runtime="vllm", as_served=arguments, prompts=prompts, new_tokens=16)
    assert result.wrong == []
    (graphs,) = (row for row in result.rows if "compiled graph" in row.what)
    assert graphs.expected == graphs.found == "5"
    with pytest.raises(InputError, match="knows no argument '--telepathy'"):
        check(plan, runtime="vllm", as_served=["--telepathy"], prompts=prompts)
    with pytest.raises(InputError, match="give `runtime` vllm"):
        check(plan, as_served=arguments)


def test_the_compiled_engine_runs_the_plan(folder_of, tmp_path):
    """torch.compile traces the planned layers like any other; and the engine takes no other weights."""
    attention, mlp, kinds = [D, P, K, D], [K, D, K, K], ["low_rank", None, None, "full"]
    plan = write_plan(tmp_path / "plan.json", folder_of("opt"), 2, attention, mlp, kinds)
    prompts = [tiny.tokens(1, n, seed=n)[0].tolist() for n in (20, 7)]
    with start(folder_of("opt"), tp=2, max_length=64, plan=plan, enforce_eager=False) as engine:
        observed, vocabulary = engine.observe(prompts, new_tokens=6), engine.vocabulary()
        with pytest.raises(Exception, match="the plan was made for those loaded at the start"):
            engine.llm.collective_rpc("reload_weights")
        again = engine.llm.generate([{"prompt_token_ids": prompts[0]}], SamplingParams(temperature=0, max_tokens=6))
        assert list(again[0].outputs[0].token_ids) == observed.tokens[0]
    lm = TensorParallelLM.simulated(build("opt"), 2)
    lm.head.cut_at(vocabulary)  # vLLM pads the vocabulary before it cuts it
    simulated = simulate(lm, prompts, continuations=observed.tokens, drops=load_plan(plan)[1])
    assert compare_logprobs("prompt", simulated.prompt, found=observed.prompt, tolerance=TOLERANCE).ok


def test_streams_stay_bit_equal_in_bfloat16(tmp_path):
    """After every block of 512 decoded tokens, without a plain drop; with one they differ from its block on."""
    folder = tiny.save(build("llama", positions=1024), tmp_path / "long")
    prompts, extension = [tiny.tokens(1, 16)[0].tolist()], "streams_extension.StreamsExtension"
    options = {"dtype": "bfloat16", "worker_extension_cls": extension}
    with start(folder, tp=2, max_length=560, **options) as engine:
        drops = Drops.of_blocks([K, D, D, D], [D, K, D, K])
        engine.set(drops)
        engine.call("spd_watch", drops.blocks("mlp"))
        assert len(engine.observe(prompts, new_tokens=512).tokens[0]) == 512
        first, second = engine.call("spd_streams")
        assert first == second
        engine.set(Drops.of_blocks([K, P, K, K]))
        engine.call("spd_watch", [])
        engine.observe(prompts, new_tokens=4)
        first, second = (streams["layers"] for streams in engine.call("spd_streams"))
        assert first[0] == second[0]
        assert all(a != b for a, b in zip(first[1:], second[1:], strict=True))


def test_a_draft_model_speculates(folder_of, tmp_path):
    """The draft is another model, of no plan; what comes out is what the planned model finds likeliest."""
    folder = folder_of("llama")
    plan = write_plan(tmp_path / "plan.json", folder, 2, [D, P, K, D], [K, D, K, K], ["low_rank", None, None, "full"])
    draft = tiny.save(build("llama", layers=2, seed=1), tmp_path / "draft")
    speculation = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 2}
    prompts = [tiny.tokens(1, n, seed=n)[0].tolist() for n in (20, 7)]
    with start(folder, tp=2, max_length=64, plan=plan, speculative_config=speculation) as engine:
        params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, detokenize=False)
        outputs = engine.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        lm = TensorParallelLM.simulated(build("llama"), 2)
        lm.head.cut_at(engine.vocabulary())
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    planned = simulate(lm, prompts, continuations=tokens, drops=load_plan(plan)[1])
    dense = simulate(lm, prompts, continuations=tokens, drops=Drops({}))
    assert [len(t) for t in tokens] == [9, 9]
    assert compare_logprobs("likeliest", planned.best, found=planned.chosen, tolerance=TOLERANCE).ok
    assert not compare_logprobs("likeliest", dense.best, found=dense.chosen, tolerance=TOLERANCE).ok
