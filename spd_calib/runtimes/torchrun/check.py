"""Do real ranks under torchrun run the plan? The plan and the dense model on them, against the simulation."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from spd_calib.formats.common import Strategy
from spd_calib.formats.files import read
from spd_calib.formats.plan import Plan
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.parallel.session import open_session
from spd_calib.runtimes.checks import Row, compare_counts, compare_run
from spd_calib.runtimes.simulation import simulate

from .launch import torchrun
from .worker import Job, Report, Seen, set_plan

WORKER = "spd_calib.runtimes.torchrun.worker"
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.25, "float16": 0.05}  # of a log-probability


def run(
    plan_path: Path,
    prompts: Sequence[str],
    model: str | None = None,
    new_tokens: int = 16,
    device: str = "cpu",
    dtype: str = "float32",
    worker: str = WORKER,
) -> list[Row]:
    """Start torchrun at the plan's TP size, run the plan and the dense model there, compare both with the simulation.

    `model` stands in for the id in the plan; `worker` is the module that the ranks run. Raises InputError where the
    plan or its model cannot be used, SpdError where a rank fails.
    """
    plan = read(Plan, plan_path)
    tp = plan.tensor_parallel.size
    session = open_session(model or plan.model.id, tp, plan.model)
    room = session.max_length - new_tokens
    ids = [session.tokenizer(p)["input_ids"][:room] for p in prompts]
    job = Job(plan=plan_path.resolve(), model=str(session.source.folder), prompts=ids, new_tokens=new_tokens,
              device=device, dtype=dtype)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        job_file, seen_file = Path(folder, "job.json"), Path(folder, "seen.json")
        job_file.write_text(job.model_dump_json())
        torchrun(tp, worker, [str(job_file), str(seen_file)])
        seen = Report.model_validate_json(seen_file.read_text())
    lm = session.load(device, dtype)
    set_plan(lm, plan, plan_path)
    rows = _rows("plan", lm, ids, seen.plan, plan.strategies, plan.mlp_strategies, TOLERANCE[dtype])
    lm.keep_all()
    kept = (Strategy.KEEP_SYNC,) * lm.num_blocks
    return rows + _rows("dense", lm, ids, seen.dense, kept, kept, TOLERANCE[dtype])


def _rows(
    name: str,
    lm: TensorParallelLM,
    prompts: Sequence[Sequence[int]],
    seen: Seen,
    attention: Sequence[Strategy],
    mlp: Sequence[Strategy],
    tolerance: float,
) -> list[Row]:
    """What the ranks did against the simulation `lm`, which runs the same strategies."""
    simulated = simulate(lm, prompts, seen.tokens)
    dropped = sum(s != Strategy.KEEP_SYNC for s in (*attention, *mlp))
    expected = 2 * lm.num_blocks - dropped
    return [
        compare_counts(f"{name}: ranks", lm.comm.size, [len(seen.all_reduces)]),
        *compare_run(name, simulated, seen.prompt, seen.chosen, seen.all_reduces, expected, tolerance),
        compare_streams(f"{name}: residual streams of the ranks", attention, seen.streams),
    ]


def compare_streams(what: str, attention: Sequence[Strategy], found: Sequence[Sequence[str]]) -> Row:
    """Digests of the residual stream after each block, by rank: bit-equal until the first plain drop."""
    blocks = len(attention)
    until = next((i for i, s in enumerate(attention) if s == Strategy.PLAIN_DROP), blocks)
    differ = [i for i, digests in enumerate(zip(*found, strict=True)) if len(set(digests)) > 1]
    expected = "bit-equal after every block" if until == blocks else f"bit-equal up to the plain drop in block {until}"
    first = min(differ, default=blocks)
    shown = "bit-equal after every block" if not differ else f"differ from block {first} on"
    return Row(what, expected, shown, first >= until and all(len(rank) == blocks for rank in found))
