"""Checking that real ranks under torchrun run a plan: the plan and the dense model, against the simulation."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from spd_calib.formats.drops import SUBLAYERS, Drops, Point, Strategy
from spd_calib.formats.phases import NOTHING_DROPPED_IN_BOTH, PHASES, ByPhase, phase_of
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.parallel.session import Session
from spd_calib.runtimes.checks import (
    CheckRow,
    compare_all_reduces,
    compare_counts,
    compare_experts,
    compare_run,
    folder_of,
    largest_difference,
)
from spd_calib.runtimes.observed import Observed
from spd_calib.runtimes.simulation import simulate

from .launch import torchrun
from .worker import CheckJob, PlannedAndDense

WORKER = "spd_calib.runtimes.torchrun.worker"
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.25, "float16": 0.05}  # of a log-probability


def check_torchrun(
    session: Session,
    plan: Path,
    *,
    drops: Drops | ByPhase,
    prompts: Sequence[str],
    new_tokens: int = 16,
    device: str = "cpu",
    dtype: str = "float32",
    worker: str = WORKER,
) -> list[CheckRow]:
    """Start torchrun at the session's TP size, run the plan and the dense model there, compare with the simulation.

    `drops` are what `plan` holds, with the predictors of all ranks; `worker` is the module that the ranks run. Raises
    InputError where the plan or its model cannot be used, SpdError where a rank fails.
    """
    ids = [session.prompt_ids(prompt, new_tokens=new_tokens) for prompt in prompts]
    job = CheckJob(plan=plan.resolve(), model=str(folder_of(session)), prompts=ids, new_tokens=new_tokens,
                   device=device, dtype=dtype)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        job_file, found_file = Path(folder, "job.json"), Path(folder, "observed.json")
        job_file.write_text(job.model_dump_json())
        torchrun(session.tp, worker, arguments=[str(job_file), str(found_file)])
        found = PlannedAndDense.model_validate_json(found_file.read_text())
    lm, off = session.load(device, dtype), TOLERANCE[dtype]
    return [
        *_rows("plan", found.planned, lm=lm, drops=ByPhase.of(drops), prompts=ids, tolerance=off),
        *_rows("dense", found.dense, lm=lm, drops=NOTHING_DROPPED_IN_BOTH, prompts=ids, tolerance=off),
    ]


def _rows(
    name: str,
    observed: Observed,
    *,
    lm: TensorParallelLM,
    drops: ByPhase,
    prompts: Sequence[Sequence[int]],
    tolerance: float,
) -> list[CheckRow]:
    """Compare what the ranks did with the simulation `lm` under the same drops.

    Where a sync is quantised, rounding alone turns some values to the next code, and that is another draw of the
    quantisation's error from there on: log-probabilities may be off by twice what it makes of them in the simulation.
    """
    simulated = simulate(lm, prompts, continuations=observed.tokens, drops=drops)
    if drops.prefill.bits or drops.decode.bits:
        in_full = drops.map(lambda of_phase: of_phase.only(of_phase))
        not_quantised = simulate(lm, prompts, continuations=observed.tokens, drops=in_full)
        tolerance += 2 * max(
            largest_difference(simulated.prompt, not_quantised.prompt),
            largest_difference(simulated.chosen, not_quantised.chosen),
        )
    # no continuation's last token is run
    run = sum(len(prompt) + len(tokens) - 1 for prompt, tokens in zip(prompts, observed.tokens, strict=True))
    return [
        compare_counts(f"{name}: ranks", lm.comm.size, found=[len(observed.all_reduces)]),
        *compare_run(name, observed, simulated=simulated, tolerance=tolerance),
        *_compare_all_reduces(name, observed, lm=lm, drops=drops, prompts=prompts),
        compare_streams(
            f"{name}: residual streams of the ranks", observed.streams, drops=drops, num_blocks=lm.num_blocks
        ),
        compare_bytes(
            f"{name}: bytes a token in each block's messages",
            [sent / run for sent in simulated.bytes],
            found=[[sent / run for sent in rank] for rank in observed.bytes],
        ),
        *([compare_experts(f"{name}: experts the ranks chose", observed.experts, lm.mixtures)] if lm.mixtures else []),
    ]


def _compare_all_reduces(
    name: str, observed: Observed, *, lm: TensorParallelLM, drops: ByPhase, prompts: Sequence[Sequence[int]]
) -> list[CheckRow]:
    """Compare the all-reduces of each forward with the syncs that are kept, by phase where each has a choice."""
    # a prompt is run twice, the second time to be continued; each further forward has one token
    lengths = [
        length
        for prompt, tokens in zip(prompts, observed.tokens, strict=True)
        for length in (len(prompt), len(prompt), *[1] * (len(tokens) - 1))
    ]
    over_all_heads = sum(any(block.all_heads_norms) for block in lm.blocks)  # each with a sync of its own
    every_sync = len(SUBLAYERS) * lm.num_blocks + over_all_heads
    if drops.one_choice:
        return [compare_all_reduces(name, observed, expected=every_sync - len(drops.decode))]
    counted = [pair for rank in observed.all_reduces for pair in zip(lengths, rank, strict=False)]
    return [
        compare_counts(
            f"{name}: all-reduces per forward and rank, {phase}",
            every_sync - len(drops.at(phase)),
            found=[n for length, n in counted if phase_of(length) == phase],
        )
        for phase in PHASES
        if any(phase_of(length) == phase for length in lengths)
    ]


def compare_bytes(what: str, expected: Sequence[float], *, found: Sequence[Sequence[float]]) -> CheckRow:
    """Check the bytes a token, block by block, in the messages of every rank: a quantised sync sends fewer."""
    total = f"{sum(expected):,.0f} in all"
    if not found or any(len(rank) != len(expected) for rank in found):
        return CheckRow(what, total, "not all seen", False)
    wrong = ((b, at, e) for rank in found for b, (at, e) in enumerate(zip(rank, expected, strict=True)) if at != e)
    for block, at, e in wrong:
        return CheckRow(what, total, f"{at:,.0f} in block {block}, not {e:,.0f}", False)
    return CheckRow(what, total, total, True)


def compare_streams(what: str, found: Sequence[Sequence[str]], *, drops: Drops | ByPhase, num_blocks: int) -> CheckRow:
    """Check digests of the residual stream after each block, by rank: bit-equal until the first plain drop."""
    phases = ByPhase.of(drops)
    either = [[d.strategy(Point(i, "attention")) for d in (phases.prefill, phases.decode)] for i in range(num_blocks)]
    plain = (i for i, strategies in enumerate(either) if Strategy.PLAIN_DROP in strategies)
    until = next(plain, num_blocks)
    differ = [i for i, digests in enumerate(zip(*found, strict=True)) if len(set(digests)) > 1]
    everywhere = "bit-equal after every block"
    expected = everywhere if until == num_blocks else f"bit-equal up to the plain drop in block {until}"
    first = min(differ, default=num_blocks)
    shown = everywhere if not differ else f"differ from block {first} on"
    return CheckRow(what, expected, shown, first >= until and all(len(rank) == num_blocks for rank in found))
