"""Real ranks over gloo: against the simulation, against the reference, and when they fail."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import plans
import pytest
import reference
import tiny
import torch
from distributed_cases import (
    ATTENTION,
    ATTENTIONS,
    BEFORE_REPLICATED,
    BITS,
    BLOCKS,
    BOTH,
    DROP,
    KEEP,
    LONG,
    MIXED,
    MLP,
    NEW_TOKENS,
    PADS,
    QUANTISED,
    REPLICATING,
    SMALL_VOCABULARY,
    replicated,
    replicating,
)
from safetensors.torch import load_file

from spd_calib.api.check import check
from spd_calib.api.options import RunOptions
from spd_calib.errors import SpdError
from spd_calib.formats.drops import NOTHING_DROPPED, Point
from spd_calib.formats.files import read
from spd_calib.formats.hardware import Hardware
from spd_calib.formats.profile import Profile
from spd_calib.models.plan_files import load_plan
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.parallel.session import open_session
from spd_calib.runtimes.torchrun.check import WORKER, check_torchrun

HERE = Path(__file__).parent
WORKERS = HERE / "workers"  # what torchrun starts


def torchrun(ranks: int, *arguments: object) -> subprocess.CompletedProcess:
    """torchrun on this machine's loopback."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", *map(str, arguments)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{HERE}:{os.environ.get('PYTHONPATH', '')}",
        "COLUMNS": "200",
    }
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint a case; those of the Llamas in several files."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for family in tiny.SUPPORTED:
        tiny.save(tiny.build(family), folder / family)
    (folder / "llama" / "model.safetensors").unlink()
    tiny.build("llama").save_pretrained(folder / "llama", max_shard_size="100KB")
    assert len(list((folder / "llama").glob("*.safetensors"))) > 2
    tiny.save(tiny.build("llama", positions=640), folder / LONG)
    tiny.save(tiny.build("llama", vocab=9), folder / SMALL_VOCABULARY, words=["a", "b", "c", "d"])
    return folder


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, folder) -> tuple[int, dict]:
    """TP size, and what as many real ranks made of every case."""
    done = torchrun(request.param, WORKERS / "run_cases.py", request.param, folder)
    assert done.returncode == 0, done.stderr[:2000]
    return request.param, torch.load(folder / f"seen_{request.param}.pt")


def words(strategies) -> list[str]:
    return [str(s) for s in strategies]


def gap(found: torch.Tensor, expected: torch.Tensor) -> float:
    return (found - expected).abs().max().item()


def test_logits_of_real_ranks_are_those_of_the_simulation_and_of_the_reference(ranks):
    tp, seen = ranks
    ids = tiny.tokens(2, 12)
    padded, mask = tiny.left_padded(ids, PADS)
    kept, dropped = (KEEP,) * BLOCKS, (DROP,) * BLOCKS
    cases = {
        "keep": (NOTHING_DROPPED, kept, kept),
        "drop": (ATTENTIONS, dropped, kept),
        "deferred": (BOTH, dropped, MLP),
        "mixed": (MIXED, ATTENTION, MLP),
    }
    for family in tiny.SUPPORTED:
        dense, lm = tiny.build(family), TensorParallelLM.simulated(tiny.build(family), tp)
        for case, (drops, attention, mlp) in cases.items():
            found = seen[family][case]
            with lm.running(drops):
                assert gap(found, lm(ids)) < 1e-5, (family, case)
            assert gap(found, reference.logits(dense, ids, tp, words(attention), words(mlp))) < 1e-5, (family, case)
        expected = reference.logits(dense, padded, tp, words(ATTENTION), words(MLP), attention_mask=mask)
        assert gap(seen[family]["padded"] * mask[..., None], expected) < 1e-5, family


def test_the_last_part_of_the_vocabulary_may_be_empty(ranks):
    tp, seen = ranks
    lm = TensorParallelLM.simulated(tiny.build("llama", vocab=9), tp)
    with lm.running(MIXED):
        assert gap(seen[SMALL_VOCABULARY], lm(tiny.tokens(2, 12, vocab=9))) < 1e-5


def test_generate_with_the_cache_is_the_same_on_all_ranks_and_in_the_simulation(ranks):
    tp, seen = ranks
    padded, mask = tiny.left_padded(tiny.tokens(2, 12), PADS)
    for family in tiny.SUPPORTED:
        lm = TensorParallelLM.simulated(tiny.build(family), tp)
        lm.model.generation_config.eos_token_id = None
        arguments = {"attention_mask": mask, "max_new_tokens": NEW_TOKENS, "pad_token_id": 0}
        with lm.running(MIXED):
            greedy = lm.model.generate(padded, do_sample=False, **arguments)
            torch.manual_seed(7)
            sampled = lm.model.generate(padded, do_sample=True, **arguments)
        assert all(torch.equal(ids, greedy) for ids in seen[family]["greedy"]), family
        assert all(torch.equal(ids, sampled) for ids in seen[family]["sampled"]), family
    dense = tiny.build("llama")
    expected = reference.generate(dense, padded, tp, words(ATTENTION), NEW_TOKENS, words(MLP), mask)
    assert torch.equal(seen["llama"]["greedy"][0], expected)


def test_two_all_reduces_a_block_and_one_where_the_attention_sync_is_dropped(ranks):
    tp, seen = ranks
    for family in tiny.SUPPORTED:
        over_all_heads = BLOCKS if family in reference.OVER_ALL_HEADS else 0  # squares of queries and keys
        assert seen[family]["counts"] == [[2 * BLOCKS + over_all_heads, BLOCKS + over_all_heads]] * tp, family


def test_streams_are_bit_equal_on_all_ranks_after_every_block(ranks):
    tp, seen = ranks
    for family in tiny.SUPPORTED:
        assert len(seen[family]["streams"]) == tp
        assert all(digests == seen[family]["streams"][0] for digests in seen[family]["streams"]), family


def test_streams_stay_bit_equal_in_bfloat16_over_512_decoded_tokens(ranks):
    _, seen = ranks
    assert seen[LONG]["length"] == 520
    assert seen[LONG]["forwards"] == 512
    assert all(digests == seen[LONG]["streams"][0] for digests in seen[LONG]["streams"])


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_quantised_syncs_are_those_of_the_simulation_in_one_shot_and_in_two(ranks, family):
    tp, seen = ranks
    found, ids = seen[f"quantised {family}"], tiny.tokens(2, 12)
    assert all(digests == found["streams"][0] for digests in found["streams"])
    lm = TensorParallelLM.simulated(tiny.build(family), tp)
    lm.model.generation_config.eos_token_id = None
    with lm.running(QUANTISED.only(QUANTISED)):
        in_full = lm(ids)
    lm.comm.bytes = 0
    with lm.running(QUANTISED):
        shots = [lm(ids)]
        greedy = lm.model.generate(ids, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0)
        lm.comm.one_shot_at_most = 0
        shots.append(lm(ids))
    for own, simulated in zip(found["shots"], shots, strict=True):  # rounding may turn a value to the next code
        assert gap(own, simulated) < 0.1 * gap(in_full, simulated)
    assert (gap(*found["shots"]) == 0) == (tp == 2)
    assert found["bytes"] == [lm.comm.bytes] * tp
    assert all(torch.equal(own, found["greedy"][0]) for own in found["greedy"])
    assert (found["greedy"][0] == greedy).float().mean() > 0.9


@pytest.mark.parametrize("stopping", [[], ["--confidence", 0.5, "--max-samples", 24, "--batch-size", 4]])
def test_a_profile_made_under_torchrun_is_the_one_made_in_simulation(folder, text, tmp_path, spd, stopping):
    arguments = ["profile", folder / "llama", "--tp", 2, "--data", text, "--seq-len", 32, "--max-samples", 4]
    arguments += ["--verify-samples", 2, "--device", "cpu", *stopping]
    done = torchrun(2, "-m", "spd_calib", *arguments, "-o", tmp_path / "real.json")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("written:") == 1
    assert spd(*arguments, "-o", tmp_path / "simulated.json").code == 0
    real, simulated = (read(Profile, tmp_path / f"{name}.json") for name in ("real", "simulated"))
    assert (real.model, real.text) == (simulated.model, simulated.text)
    for a, b in zip(real.measurements, simulated.measurements, strict=True):
        assert (a.block, a.strategy, a.sequences) == (b.block, b.strategy, b.sequences)
        assert a.kl == pytest.approx(b.kl, abs=1e-6)
        assert a.nll_increase == pytest.approx(b.nll_increase, abs=1e-6)
    assert bool(stopping) == any(m.stopped_early for m in real.measurements)


def test_torchrun_with_another_number_of_ranks_is_refused_once(folder, text):
    done = torchrun(2, "-m", "spd_calib", "profile", folder / "llama", "--tp", 4, "--data", text)
    assert done.returncode != 0
    assert done.stderr.count("spd-calib: torchrun started 2 ranks, but TP is 4") == 1
    assert done.stderr.count("spd-calib: ") == 1


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", "spd-calib: Rank 1 cannot go on."),
        ("killed", "spd-calib: Rank 0 has lost another rank"),
        ("all", "spd-calib: Every rank found the same fault."),
    ],
)
def test_one_rank_failing_ends_all_soon_with_one_message(how, message):
    done = torchrun(2, WORKERS / "fail.py", how)
    ended = time.time()
    assert done.returncode != 0
    failed = max(float(t) for t in re.findall(r"rank \d at ([\d.]+)", done.stderr))
    assert ended - failed < 30  # two seconds on an idle machine; without an end it would be half an hour
    if how == "killed":  # torchrun may be quicker than the rank that is left, and says so itself
        assert "SIGKILL" in done.stderr
        assert done.stderr.count("spd-calib: ") == done.stderr.count(message) <= 1
    else:
        assert done.stderr.count(message) == done.stderr.count("spd-calib: ") == 1
    assert not _running(WORKERS / "fail.py")


def _running(script: Path) -> list[str]:
    """Processes of ours whose command line names `script`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if str(script) in command:
            found.append(" ".join(command))
    return found


PLANNED = ["block_drop", "keep_sync", "block_drop", "block_drop"]


def checked(plan: Path, folder: Path, prompts: list[str], *, worker: str, new_tokens: int = 4) -> list:
    """The rows of a check whose ranks run the module `worker`."""
    document, drops = load_plan(plan)
    session = open_session(str(folder), document.tensor_parallel.size, expected=document.model)
    return check_torchrun(session, plan, drops=drops, prompts=prompts, new_tokens=new_tokens, worker=worker)


def test_check_passes_a_runtime_that_runs_the_plan(folder, tmp_path):
    """Of a model with one sync more a block, of the squares of its queries and keys."""
    plan = plans.write_plan(tmp_path / "plan.json", folder / "olmo2", 2, PLANNED, words(MLP))
    prompts = tiny.stories(2, shortest=6, longest=9)
    result = check(plan, runtime="torchrun", prompts=prompts, new_tokens=8, run=RunOptions(device="cpu"))
    assert result.ok and all(row.ok for row in result.rows), result
    found = {row.what: row.found for row in result.rows}
    assert found["plan: all-reduces per forward and rank"] == "7"
    assert found["dense: all-reduces per forward and rank"] == "12"


@pytest.mark.parametrize(
    ("worker", "caught_by"),
    [
        ("ignore_plan", {"prompt tokens", "greedy continuation", "all-reduces per forward and rank"}),
        ("drop_plainly", {"prompt tokens", "greedy continuation", "residual streams of the ranks"}),
    ],
)
def test_check_catches_a_runtime_that_does_something_else(folder, tmp_path, monkeypatch, worker, caught_by):
    monkeypatch.setenv("PYTHONPATH", f"{WORKERS}:{os.environ.get('PYTHONPATH', '')}")
    plan = plans.write_plan(tmp_path / "plan.json", folder / "llama", 2, PLANNED)
    rows = checked(plan, folder / "llama", tiny.stories(1, shortest=6, longest=9), worker=worker)
    wrong = {row.what for row in rows if not row.ok}
    assert {f"plan: {what}" for what in caught_by} <= wrong
    assert all(what.startswith("plan: ") for what in wrong)


@pytest.mark.parametrize("worker", [WORKER, "ignore_predictors"])
def test_check_of_a_compensation(folder, tmp_path, monkeypatch, worker):
    """Every kind of predictor on real ranks, and replicated heads; a runtime that ignores the predictors is caught."""
    monkeypatch.setenv("PYTHONPATH", f"{WORKERS}:{os.environ.get('PYTHONPATH', '')}")
    drop = ["block_drop"] * 4
    mlp = ["keep_sync", "block_drop", "keep_sync", "keep_sync"]
    kinds = ["mean", "low_rank", "full", None]
    groups = {3: ((1,), (0,))}
    plan = plans.write_plan(tmp_path / "plan.json", folder / "llama_bias", 2, drop, mlp, kinds, replicated=groups)
    rows = checked(plan, folder / "llama_bias", tiny.stories(1, shortest=6, longest=9), worker=worker)
    wrong = {row.what for row in rows if not row.ok}
    if worker == WORKER:
        assert not wrong
    else:
        assert "plan: prompt tokens" in wrong and "plan: all-reduces per forward and rank" not in wrong


@pytest.mark.parametrize("worker", [WORKER, "ignore_bits", "quantise_all"])
def test_check_of_quantised_syncs(folder, tmp_path, monkeypatch, worker):
    """A runtime that sends in full what is to be quantised is caught, and one that quantises every sync."""
    monkeypatch.setenv("PYTHONPATH", f"{WORKERS}:{os.environ.get('PYTHONPATH', '')}")
    strategies = [QUANTISED.strategy(Point(b, kind)) for kind in ("attention", "mlp") for b in range(BLOCKS)]
    attention, mlp, full = strategies[:BLOCKS], strategies[BLOCKS:], (0, "mlp")
    bits = {place: n for place, n in BITS.items() if place != full}
    plan = plans.write_plan(tmp_path / "plan.json", folder / "llama", 2, words(attention), words(mlp), bits=bits)
    assert load_plan(plan)[1] == QUANTISED.only(p for p in QUANTISED.by_point if p != Point(*full))
    rows = checked(plan, folder / "llama", tiny.stories(2, shortest=6, longest=9), worker=worker)
    wrong = {row.what for row in rows if not row.ok}
    sent = "plan: bytes a token in each block's messages"
    assert not wrong if worker == WORKER else sent in wrong
    assert not any(what.startswith("dense") or "all-reduces" in what or "streams" in what for what in wrong)


@pytest.mark.parametrize("worker", ["ignore_replicated", "replicate_all"])
def test_check_of_replicated_heads(folder, tmp_path, monkeypatch, worker):
    """A runtime that does not replicate what it should is caught, and one that replicates where it should not.

    One that does what it should passes in test_check_of_a_compensation.
    """
    monkeypatch.setenv("PYTHONPATH", f"{WORKERS}:{os.environ.get('PYTHONPATH', '')}")
    groups = {1: ((1,), (0,))}
    plan = plans.write_plan(tmp_path / "plan.json", folder / "llama", 2, ["block_drop"] * BLOCKS, replicated=groups)
    assert load_plan(plan)[1].replicated == groups
    rows = checked(plan, folder / "llama", tiny.stories(1, shortest=6, longest=9), worker=worker)
    wrong = {row.what for row in rows if not row.ok}
    assert "plan: prompt tokens" in wrong
    assert not any(what.startswith("dense") or "all-reduces" in what for what in wrong)


def test_check_refuses_a_stale_plan(folder, tmp_path):
    plan = plans.write_plan(tmp_path / "plan.json", folder / "llama", 2, PLANNED)
    with pytest.raises(SpdError, match="not the model") as refused:
        check(plan, runtime="torchrun", prompts=["a"], model=folder / "llama_bias")
    assert refused.value.exit_code == 1  # it is an answer: whether they fit was the question


@pytest.mark.parametrize("family", REPLICATING)
def test_replicated_heads_on_real_ranks(ranks, family):
    """Loaded beside the rank's own, and computed with the cache as in the simulation."""
    tp, seen = ranks
    found, ids, dense = seen[f"replicated {family}"], tiny.tokens(2, 12), tiny.build(family)
    groups = replicated(tp, getattr(dense.config, "num_key_value_heads", dense.config.num_attention_heads))
    lm = TensorParallelLM.simulated(tiny.build(family), tp)
    lm.model.generation_config.eos_token_id = None
    with lm.running(replicating(groups)):
        assert gap(found["logits"], lm(ids)) < 1e-5
        greedy = lm.model.generate(ids, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0)
    assert all(torch.equal(own, greedy) for own in found["greedy"])
    expected = reference.logits(dense, ids, tp, words([DROP] * BLOCKS), words(BEFORE_REPLICATED), replicated=groups)
    assert gap(found["logits"], expected) < 1e-5 and gap(found["keep"], dense(ids).logits) < 1e-5
    assert found["refused"].startswith("Block 0 was loaded without the heads that are to be replicated")
    assert all(more > 0 for more in found["more"])


def test_bench_measures_sums_and_steps_on_real_ranks(folder, tmp_path, spd):
    plan = plans.write_plan(tmp_path / "plan.json", folder / "llama", 2, PLANNED, words(MLP))
    done = spd("bench", plan, "-o", tmp_path / "hardware.json", "--rounds", 2, "--tokens", 8, "--new-tokens", 3,
               "--batch-size", 1, "--batch-size", 2, "--device", "cpu")  # fmt: skip
    assert done.code == 0, done.err
    hardware = read(Hardware, tmp_path / "hardware.json")
    assert (hardware.backend, hardware.nodes, hardware.tensor_parallel.size) == ("gloo", 1, 2)
    sizes = list(hardware.all_reduce_seconds())
    assert sizes == sorted(sizes) and sizes[0] == 1024
    used = {c.bytes: c for c in hardware.collectives if c.method == "all_gather_and_sum" and c.bytes <= 32768}
    used |= {c.bytes: c for c in hardware.collectives if c.method == "all_reduce" and c.bytes > 32768}
    assert hardware.all_reduce_seconds() == {
        size: used[size].seconds.median for size in sizes
    }  # as the steps made them
    assert {(s.phase, s.batch, s.tokens, s.blocks, s.dropped, s.seconds.repeats) for s in hardware.steps} == {
        (phase, batch, 8, blocks, dropped, 2 * repeats)
        for phase, repeats in (("prefill", 1), ("decode", 3))
        for batch in (1, 2)
        for blocks, dropped in (("dense", 0), ("plan", 5), ("every_block_dropped", 4))
    }
    assert (hardware.runtime, hardware.execution) == ("torchrun", "eager")
    assert "eager forward, no serving engine, on 2 ranks" in done.err
    timed = {bits: list(hardware.quantised_sync_seconds(bits)) for bits in (8, 6, 4)}
    assert timed == dict.fromkeys((8, 6, 4), sizes[::2]) and all(s.quantised == {} for s in hardware.steps)
    for c in hardware.collectives:
        assert 0 < c.seconds.p10 <= c.seconds.median <= c.seconds.p90


def test_generate_under_torchrun_writes_what_the_simulation_writes_once(folder, tmp_path, spd):
    plan = plans.write_plan(tmp_path / "plan.json", folder / "llama", 2, PLANNED, words(MLP))
    arguments = ["generate", plan, "--prompt", "the cat", "--new-tokens", 12, "--sample", "--seed", 3]
    arguments += ["--dense", "--device", "cpu"]
    simulated = spd(*arguments)
    assert simulated.code == 0
    assert len(simulated.out.splitlines()) == 2 and simulated.out.startswith("the cat ")
    done = torchrun(2, "-m", "spd_calib", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout == simulated.out


def test_processes_that_distil_together_give_what_one_gives(folder, text, tmp_path, spd):
    """Batches are of three rows, so that the shares are unequal, and of the last batch, of one row, one has none."""
    given = ("--data", text, "--seq-len", 24, "--device", "cpu")
    assert spd("profile", folder / "llama", "--tp", 4, *given, "--max-samples", 12, "--verify-samples", 8,
               "--strategy", "block_drop", "-o", tmp_path / "p.json").code == 0  # fmt: skip
    assert spd("plan", tmp_path / "p.json", "--drop", 3, "-o", tmp_path / "plan.json", "--device", "cpu").code == 0
    arguments = ("recover", tmp_path / "plan.json", *given, "--max-samples", 34, "--verify-samples", 6,
                 "--batch-size", 4, "--tau1", 0, "--tau2", 0, "--methods", "compensation,distillation",
                 "--steps", 30, "--final-steps", 10)  # fmt: skip
    assert spd(*arguments, "-o", tmp_path / "one").code == 0
    done = torchrun(2, "-m", "spd_calib", *arguments, "-o", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("verified on other text") == 1 and not list(tmp_path.glob("*.partial"))

    one, two = (json.loads((tmp_path / name / "recovery.json").read_text()) for name in ("one", "two"))
    assert [a["kept"] for a in one["attempts"]] == [a["kept"] for a in two["attempts"]]
    assert any(a["kept"] and a["treatment"] == "distillation" for a in one["attempts"])
    for a, b in zip(one["attempts"], two["attempts"], strict=True):
        found = [x["detail"]["error_after"] if x["kl_after"] is None else x["kl_after"] for x in (a, b)]
        assert found[0] == pytest.approx(found[1], rel=0.02)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    dense = {n: t for f in (folder / "llama").glob("*.safetensors") for n, t in load_file(f).items()}
    moved = [{n: t - dense[n] for n, t in w.items()} for w in weights]
    difference = sum((moved[0][n] - moved[1][n]).square().sum() for n in dense).sqrt()
    assert difference < 0.1 * sum(m.square().sum() for m in moved[0].values()).sqrt()
