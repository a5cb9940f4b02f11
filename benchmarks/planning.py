"""What planning costs: forwards of the calibration text, and time against one dense forward of it, for many budgets.

    .venv/bin/python benchmarks/planning.py [-o results/benchmarks/planning.json]

On a random Llama of 30 blocks of unequal weight, TP 4, block_drop at each attention. A forward is all blocks
run on all of the text once; what verifies is left out of it. Times are CPU seconds of one thread.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from profiling import block_drops, random_llama, random_tokens, timed

from spd_calib.errors import SpdError
from spd_calib.formats.common import ModelRef, Provenance, TensorParallel, TextRef
from spd_calib.formats.drops import Drops
from spd_calib.formats.plan import Budget
from spd_calib.formats.profile import Comparison, Profile
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.parallel.session import versions
from spd_calib.planning.search import choose
from spd_calib.planning.whole_plans import Calibration, measure_plans, part_of
from spd_calib.sensitivity.measure import Subject, batches
from spd_calib.sensitivity.profile import profile

BLOCKS, TP, BATCH = 30, 4, 16
SEQUENCES, VERIFIED, LENGTH = 32, 8, 32
SHARES = (0.02, 0.05, 0.3, 1.0)  # of what all sync points cost by the sum of their singles
BUDGETS = {"max_ppl_increase": (0.01, 0.02, 0.1), "max_accuracy_drop": (0.005, 0.02), "max_logprob_diff": (2.0, 6.0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", type=Path, default=Path("results/benchmarks/planning.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    lm = TensorParallelLM.simulated(random_llama(BLOCKS, 64), TP)
    text = random_tokens(SEQUENCES + VERIFIED, LENGTH)
    calibration, held_out = text[:SEQUENCES], text[SEQUENCES:]
    measured = profile_of(lm, calibration)
    total = sum(m.kl for m in measured.measurements)
    budgets = {"max_kl": [share * total for share in SHARES], **BUDGETS}
    rows = [
        planned(lm, measured, Budget(kind=kind, value=value, strategies=["block_drop"]), calibration, held_out)
        for kind, values in budgets.items()
        for value in values
    ]
    document = {"versions": versions(), "blocks": BLOCKS, "sequences": SEQUENCES, "budgets": rows}
    options.o.parent.mkdir(parents=True, exist_ok=True)
    options.o.write_text(json.dumps(document, indent=1) + "\n")


def profile_of(lm: TensorParallelLM, sequences: list[list[int]]) -> Profile:
    baseline, measurements, _ = profile(Subject(lm), sequences, rows=block_drops(lm), batch_size=BATCH)
    texts = [
        TextRef(source="random", seq_len=LENGTH, min_len=LENGTH, pack=False, first=0, sequences=n, tokens=n * LENGTH,
                sha256="0" * 64)
        for n in (SEQUENCES, VERIFIED)
    ]  # fmt: skip
    return Profile(
        model=ModelRef(id="random", architecture="Llama", num_blocks=BLOCKS, config_hash="0" * 64,
                       weight_fingerprint="0" * 64),
        tensor_parallel=TensorParallel(size=TP), method="single", rank_by="kl", text=texts[0], verify_text=texts[1],
        baseline=baseline, measurements=measurements,
        provenance=Provenance(command="benchmarks/planning.py", seed=0, device="cpu", dtype="float32", versions={}),
    )  # fmt: skip


class Counter:
    """Counts, while plans are measured, the tokens that pass each block."""

    def __init__(self, lm: TensorParallelLM):
        self.passed = 0
        for block in lm.blocks:
            block.run = self._counting(block.run)

    def _counting(self, run: Callable) -> Callable:
        def counted(s, *args, **kwargs):
            self.passed += s.shared.shape[0] * s.shared.shape[1]
            return run(s, *args, **kwargs)

        return counted


def planned(lm: TensorParallelLM, measured: Profile, budget: Budget, calibration: list, held_out: list) -> dict:
    forward, _ = timed(lambda: [lm(ids) for ids, _ in batches(calibration, BATCH, lm.device)])
    plans = {"whole": 0, "part": 0}
    seconds = 0.0
    counter = Counter(lm)

    def on(text: list, name: str) -> Callable[[list[Drops]], list[Comparison]]:
        def measure(sets: list[Drops]) -> list[Comparison]:
            plans[name] += len(sets)
            return measure_plans(sets, [text], subject=Subject(lm), batch_size=BATCH)

        return measure

    def verify(drops: Drops, used_up: int) -> Comparison:
        nonlocal seconds
        passed, start = counter.passed, time.process_time()
        found = measure_plans([drops], [held_out], subject=Subject(lm), batch_size=BATCH)[0]
        counter.passed, seconds = passed, seconds - (time.process_time() - start)
        return found

    start = time.process_time()
    try:
        choice = choose(
            measured, budget, verify=verify,
            calibration=Calibration(on(calibration, "whole"), race=on(part_of(calibration), "part")),
        )  # fmt: skip
        dropped = len(choice.drops)
    except SpdError:
        dropped = 0
    seconds += time.process_time() - start
    row = {
        "kind": budget.kind,
        "value": budget.value,
        "dropped": dropped,
        "forwards": round(counter.passed / (SEQUENCES * LENGTH * BLOCKS), 1),
        "of_one_forwards_time": round(seconds / forward, 1),
        "sets_on_the_whole_text": plans["whole"],
        "sets_on_part": plans["part"],
    }
    for block in lm.blocks:
        del block.run
    print(row, flush=True)
    return row


if __name__ == "__main__":
    main()
