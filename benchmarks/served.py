"""How often `check --runtime vllm --as-served` is wrong: of engines that run the plan, and of engines that do not.

    .venv-vllm/bin/python benchmarks/served.py [--runs 20]
    .venv/bin/python benchmarks/served.py --played [--runs 20]

Starts vLLM on a CPU, compiled and in bfloat16, on a tiny random Llama at TP 2: once with the right plan, and once with
each fault. Each engine is judged `--runs` times against the right plan, each time on tokens sampled anew. Writes
results/benchmarks/served.json: for each engine how often it was refused, and by which rows. With `--played` no engine
is started: its part is played by the simulation in bfloat16, on random tokens (served_played.json).
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file, save_file

from spd_calib.formats.drops import NOTHING_DROPPED, Drops
from spd_calib.formats.files import sha256_of
from spd_calib.models.plan_files import load_plan
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.parallel.session import versions
from spd_calib.runtimes.observed import Observed
from spd_calib.runtimes.simulation import simulate
from spd_calib.runtimes.vllm.as_served import judge, log_probs, round_weights
from spd_calib.runtimes.vllm.engine import Engine, start_served

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests" / "with_vllm"), str(ROOT / "tests")]

import tiny  # noqa: E402
from conftest import build  # noqa: E402
from plans import write_plan  # noqa: E402

K, D, P = "keep_sync", "block_drop", "plain_drop"
ATTENTION, MLP, KINDS = [D, K, D, D], [K, D, K, K], ["low_rank", None, "full", None]
NO_PREDICTORS = [None] * 4
ENGINES = {
    "the plan": (ATTENTION, MLP, KINDS),
    "no plan": None,
    "one block's drop missing": ([D, K, D, K], MLP, KINDS),
    "plain for block drop": ([D, K, D, P], MLP, KINDS),
    "predictors ignored": (ATTENTION, MLP, NO_PREDICTORS),
    "a stale predictor file": (ATTENTION, MLP, KINDS),
}
"""What each engine is started with."""

STALE = 0.8  # the stale file's tensors are these many times the right ones
PROMPTS = [tiny.tokens(1, n, seed=n)[0].tolist() for n in (12, 9, 7)]
NEW, ROUNDS_A_RUN = 16, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--played", action="store_true")
    args = parser.parse_args()
    runs, played = args.runs, args.played
    began, found = time.monotonic(), {}
    with tempfile.TemporaryDirectory() as place:
        folder = tiny.save(build("llama"), Path(place) / "model")
        right = plan_of(Path(place) / "right", folder, ENGINES["the plan"])
        for i, (name, blocks) in enumerate(ENGINES.items()):
            plan = blocks and plan_of(Path(place) / str(i), folder, blocks)
            if name == "a stale predictor file":
                make_stale(plan)
            if played:
                found[name] = judged(Played(load_plan(plan)[1] if plan else NOTHING_DROPPED), right, runs)
            else:
                with start_served(folder, tp=2, plan=plan, longest=64,
                                  arguments=["--dtype", "bfloat16", "--max-model-len", "64"]) as engine:  # fmt: skip
                    found[name] = judged(engine, right, runs)
            print(name, json.dumps(found[name]), flush=True)
    document = {
        "command": f"python benchmarks/served.py {'--played ' * played}--runs {runs}",
        "model": "a random Llama of 4 blocks, width 128, TP 2, bfloat16",
        "engine": "the simulation in bfloat16" if played else "vLLM on a CPU, compiled",
        "runs_each": runs, "prompts": len(PROMPTS), "new_tokens": NEW, "seconds": round(time.monotonic() - began),
        "versions": versions(), "engines": found,
    }  # fmt: skip
    name = "served_played.json" if played else "served.json"
    (ROOT / "results" / "benchmarks" / name).write_text(json.dumps(document, indent=1) + "\n")


class Played:
    """An engine's part, played by the simulation in bfloat16."""

    def __init__(self, drops: Drops):
        self.lm, self.drops = TensorParallelLM.simulated(build("llama").bfloat16(), 2), drops

    def observe(self, prompts: list[list[int]], *, new_tokens: int, seed: int) -> Observed:
        """Return what the simulation says of the prompts and of random tokens behind them."""
        tokens = tiny.tokens(len(prompts), new_tokens, seed=1000 + seed).tolist()
        run = simulate(self.lm, prompts, continuations=tokens, drops=self.drops)
        return Observed(prompt=run.prompt, tokens=tokens, chosen=run.chosen, all_reduces=[])


def plan_of(place: Path, folder: Path, blocks: tuple) -> Path:
    place.mkdir()
    return write_plan(place / "plan.json", folder, 2, *blocks)


def make_stale(plan: Path) -> None:
    """Change the predictors beside a plan, and have the plan vouch for the changed ones."""
    document = json.loads(plan.read_text())
    file = plan.with_name(document["compensation"]["file"])
    save_file({name: STALE * tensor for name, tensor in load_file(file).items()}, file)
    document["compensation"]["sha256"] = sha256_of(file)
    plan.write_text(json.dumps(document))


def judged(engine: Engine | Played, right: Path, runs: int) -> dict:
    """Return how many of the runs were refused, and by which rows, and what the first and the last one's rows found."""
    drops = load_plan(right)[1]
    lm = TensorParallelLM.simulated(build("llama"), 2)
    narrow = TensorParallelLM.simulated(build("llama").bfloat16(), 2)
    if not isinstance(engine, Played):
        for model in (lm, narrow):
            model.head.cut_at(engine.vocabulary())
    round_weights(lm, "bfloat16")
    refused, rows_refused, shown = 0, {}, []
    for run in range(runs):
        seeds = range(ROUNDS_A_RUN * run, ROUNDS_A_RUN * (run + 1))
        samples = [engine.observe(PROMPTS, new_tokens=NEW, seed=seed) for seed in seeds]
        rounded = [log_probs(narrow, drops, PROMPTS, sample) for sample in samples]
        rows = judge(lm, drops, prompts=PROMPTS, samples=samples, rounded=rounded, dtype="bfloat16")
        refused += not all(row.ok for row in rows)
        for row in rows:
            rows_refused[row.what] = rows_refused.get(row.what, 0) + (not row.ok)
        shown.append({row.what: f"{row.found} where {row.expected}" for row in rows})
    return {
        "refused": refused,
        "by_row": rows_refused,
        "all_reduces_in_graph": None if isinstance(engine, Played) else engine.traced_all_reduces(),
        "first_run": shown[0],
        "last_run": shown[-1],
    }


if __name__ == "__main__":
    main()
