"""--dry-run: counts against a run that counts, memory against what the process takes, and no file written."""

import re

import pytest
import tiny
import torch

from spd_calib.formats.drops import Strategy
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.sensitivity.estimate import estimate
from spd_calib.sensitivity.measure import Subject
from spd_calib.sensitivity.profile import experiments, profile


def test_forwards_are_the_blocks_that_are_run():
    lm = TensorParallelLM.simulated(tiny.build("llama"), 2)
    sequences = tiny.tokens(6, 12).tolist()
    strategies = [Strategy.BLOCK_DROP, Strategy.PLAIN_DROP]
    rows = list(experiments("single", strategies, num_blocks=lm.num_blocks, sync_points=["attention", "mlp"]))
    found = estimate(lm, sequences, plans=[row.drops for row in rows], batch_size=4)
    tokens = []
    for block in lm.blocks:
        block.mlps[0].register_forward_hook(lambda m, args, out: tokens.append(out.shape[:2].numel()))
    profile(Subject(lm), sequences, rows=rows, batch_size=4)
    assert found.forwards == pytest.approx(sum(tokens) / lm.num_blocks / found.tokens)
    assert (found.batches, found.tokens) == (2, 72)
    assert found.seconds > 0
    held = {id(p): p for p in lm.model.parameters()}
    assert found.weights <= sum(p.untyped_storage().nbytes() for p in held.values()) and found.weights < found.peak


@pytest.mark.parametrize("method", ["single", "cumulative", "fisher"])
def test_a_dry_run_writes_nothing_and_says_what_would_be_run(spd, llama, text, tmp_path, method):
    outcome = spd(
        "profile", llama, "--tp", 2, "--data", text, "--seq-len", 16, "--max-samples", 12, "--verify-samples", 8,
        "--method", method, "--dry-run", "-o", tmp_path / "p.json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    said = outcome.err.replace("\n", " ")
    assert "2 batches, 192 tokens" in said and re.search(r"time: about 0 h 0 min \d+ s", said)
    assert "memory: about" in said and "nothing was written" in said
    if method != "fisher":
        assert "8 experiments and the dense model" in said and "6.0 forwards" in said  # 1 + 2 (4 + 3 + 2 + 1) / 4
    assert list(tmp_path.iterdir()) == []


def test_memory_is_that_of_a_process_that_runs_it():
    """Tensors alive at the peak, by torch's own profiler of allocations."""
    lm = TensorParallelLM.simulated(tiny.build("llama", positions=512), 2)
    sequences = tiny.tokens(8, 512).tolist()
    rows = list(experiments("single", [Strategy.BLOCK_DROP], num_blocks=lm.num_blocks))
    found = estimate(lm, sequences, plans=[row.drops for row in rows], batch_size=8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        profile(Subject(lm), sequences, rows=rows, batch_size=8)
    alive = peak = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    assert peak / 1.5 < found.peak - found.weights < 1.5 * peak, (peak, found)
