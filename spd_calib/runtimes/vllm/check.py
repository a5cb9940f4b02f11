"""Checking that vLLM runs a plan: the plan and the dense model on real ranks, against the simulation."""

from collections.abc import Sequence
from pathlib import Path

from spd_calib.errors import InputError
from spd_calib.formats.drops import NOTHING_DROPPED, SUBLAYERS, Drops
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.parallel.session import Session
from spd_calib.runtimes.checks import (
    CheckRow,
    compare_all_reduces,
    compare_experts,
    compare_run,
    folder_of,
    largest_difference,
)
from spd_calib.runtimes.observed import Observed
from spd_calib.runtimes.simulation import simulate

from .engine import start

TOLERANCE = 1e-4  # of a log-probability in float32


def check_vllm(
    session: Session, plan: Path, *, drops: Drops, prompts: Sequence[str], new_tokens: int = 16
) -> list[CheckRow]:
    """Start vLLM at the session's TP size with the plan, swap in the dense model, compare both with the simulation.

    `drops` are what `plan` holds, with the predictors of all ranks. Works in float32 on both sides. Raises InputError
    where vLLM or the plan cannot be used, and for a quantised model, of which vLLM computes nothing in float32 alone.
    """
    if session.ref.quantised:
        raise InputError(
            "vLLM rounds what a quantised model's layers read, or runs it in half precision only, so the fourth digit "
            "cannot be asked for; check the engine that you serve, with `as_served`, '--dtype bfloat16' for one."
        )
    ids = [session.tokenizer(p)["input_ids"] for p in prompts]
    longest = max(map(len, ids)) + new_tokens
    with start(folder_of(session), tp=session.tp, max_length=longest, plan=plan) as engine:
        planned = engine.observe(ids, new_tokens=new_tokens)
        vocabulary = engine.vocabulary()
        engine.set(NOTHING_DROPPED)
        dense = engine.observe(ids, new_tokens=new_tokens)
    lm = session.load("cpu", "float32")
    lm.head.cut_at(vocabulary)
    return compare(lm, drops, prompts=ids, planned=planned, dense=dense)


def compare(
    lm: TensorParallelLM, drops: Drops, *, prompts: Sequence[Sequence[int]], planned: Observed, dense: Observed
) -> list[CheckRow]:
    """Compare what an engine did under a plan, and as the dense model, with the simulation of both.

    vLLM pads the vocabulary before it cuts it, so its parts may differ from lm's: after a plain drop, where each rank
    has a stream of its own, that shows, and `lm` has to be cut where the engine is (Engine.vocabulary).
    """
    simulated = simulate(lm, prompts, continuations=planned.tokens, drops=drops)
    simulated_dense = simulate(lm, prompts, continuations=dense.tokens, drops=NOTHING_DROPPED)
    rows = [
        *compare_run("plan", planned, simulated=simulated, tolerance=TOLERANCE),
        compare_all_reduces("plan", planned, expected=all_reduces_expected(lm, drops)),
        *compare_run("dense", dense, simulated=simulated_dense, tolerance=TOLERANCE),
        compare_all_reduces("dense", dense, expected=all_reduces_expected(lm, NOTHING_DROPPED)),
    ]
    if lm.mixtures:
        runs = (("plan", planned), ("dense", dense))
        rows += [compare_experts(f"{name}: experts the ranks chose", r.experts, lm.mixtures) for name, r in runs]
    if drops:
        expected = largest_difference(simulated.prompt, simulated_dense.prompt)
        found = largest_difference(planned.prompt, dense.prompt)
        near = abs(expected - found) <= 2 * TOLERANCE
        rows.append(CheckRow("plan against dense: max |Δ log p|", f"{expected:.4f}", f"{found:.4f}", near))
    return rows


def all_reduces_expected(lm: TensorParallelLM, drops: Drops) -> int:
    """Return two a block, one for the vocabulary-parallel embedding, less the sync points dropped; 0 on one rank."""
    return len(SUBLAYERS) * lm.num_blocks + 1 - len(drops) if lm.comm.size > 1 else 0
