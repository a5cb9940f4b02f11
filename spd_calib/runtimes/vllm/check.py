"""Does vLLM run the plan? The plan and the dense model on real ranks, against the simulation."""

from collections.abc import Sequence
from pathlib import Path

from spd_calib.formats.common import Strategy
from spd_calib.formats.files import read
from spd_calib.formats.plan import Plan
from spd_calib.models.load import load_dense, load_tokenizer, locate, read_config
from spd_calib.parallel.compensation import load_compensation
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.runtimes.checks import Row, compare_run, largest_difference
from spd_calib.runtimes.simulation import simulate

from .engine import Seen, start

TOLERANCE = 1e-4  # of a log-probability in float32


def run(plan_path: Path, prompts: Sequence[str], model: str | None = None, new_tokens: int = 16) -> list[Row]:
    """Start vLLM at the plan's TP size with the plan, then swap in the dense model; compare both with the simulation.

    `model` stands in for the id in the plan. Raises InputError where vLLM or the plan cannot be used.
    """
    plan = read(Plan, plan_path)
    source = locate(model or plan.model.id, plan.model.revision)
    ids = [load_tokenizer(source)(p)["input_ids"] for p in prompts]
    with start(source.folder, plan.tensor_parallel.size, max(map(len, ids)) + new_tokens, plan_path) as engine:
        planned = engine.see(ids, new_tokens)
        engine.set([Strategy.KEEP_SYNC] * plan.model.num_blocks)
        dense = engine.see(ids, new_tokens)
    lm = TensorParallelLM.simulated(
        load_dense(source, read_config(source), device="cpu", dtype="float32"), plan.tensor_parallel.size
    )
    lm.set_compensation(load_compensation(plan, plan_path))
    return compare(lm, plan.strategies, plan.mlp_strategies, ids, planned, dense)


def compare(
    lm: TensorParallelLM,
    attention: Sequence[Strategy],
    mlp: Sequence[Strategy],
    prompts: Sequence[Sequence[int]],
    planned: Seen,
    dense: Seen,
) -> list[Row]:
    """Rows of expected and found for what an engine did under a plan (lm has its predictors), and as the dense model.

    vLLM pads the vocabulary before it cuts it, so its parts may differ from lm's: after a plain drop, where each rank
    has a stream of its own, that shows, and lm is made to cut where the engine does.
    """
    lm.head.rows = [slice(*part) for part in planned.vocabulary]
    lm.set_strategies(attention, mlp)
    simulated = simulate(lm, prompts, planned.tokens)
    lm.keep_all()
    simulated_dense = simulate(lm, prompts, dense.tokens)
    dropped = sum(s != Strategy.KEEP_SYNC for s in (*attention, *mlp))
    rows = []
    for name, simulation, seen, fewer in (("plan", simulated, planned, dropped), ("dense", simulated_dense, dense, 0)):
        made = _all_reduces(lm, fewer)
        rows += compare_run(name, simulation, seen.prompt, seen.chosen, seen.all_reduces, made, TOLERANCE)
    if dropped:
        expected = largest_difference(simulated.prompt, simulated_dense.prompt)
        found = largest_difference(planned.prompt, dense.prompt)
        near = abs(expected - found) <= 2 * TOLERANCE
        rows.append(Row("plan against dense: max |Δ log p|", f"{expected:.4f}", f"{found:.4f}", near))
    return rows


def _all_reduces(lm: TensorParallelLM, dropped: int) -> int:
    """Two a block, one for the vocabulary-parallel embedding, less the sync points dropped; none on one rank."""
    return 2 * lm.num_blocks + 1 - dropped if lm.comm.size > 1 else 0
