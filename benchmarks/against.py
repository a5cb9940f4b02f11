"""Whether profiling takes longer than with another version of this code, turn about, in one run.

    git worktree add --detach /tmp/before a2c57dc
    .venv/bin/python benchmarks/against.py /tmp/before [-o results/benchmarks/against.json]

Each run is the whole command in a process of its own, imports and all, on one thread: its CPU seconds, so that other
work on the machine hardly matters. Both are compiled to bytecode before, as an installed package is. The two versions
take turns, the second one first in every other round. The models are the demo's and ../shared/models/stories260k (left
out, saying so, where it is not there).
"""

import argparse
import compileall
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from budgets import MODELS

HERE = Path(__file__).parents[1]
OPTIONS = ["--tp", "4", "--max-samples", "64", "--verify-samples", "16", "--device", "cpu"]


def cpu_seconds(checkout: Path, model: Path, data: Path, length: int) -> float:
    """Return the CPU seconds of `spd-calib profile` by the code in a checkout."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        line = [sys.executable, "-m", "spd_calib", "profile", model, "--data", data, "--seq-len", str(length)]
        process = subprocess.Popen(
            [*line, *OPTIONS, "-o", "profile.json"], cwd=folder, env=environment, stderr=subprocess.DEVNULL
        )
        _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"profiling {model} failed with the code in {checkout}")
    return used.ru_utime + used.ru_stime


def commit(checkout: Path) -> str:
    """Return the commit of a checkout."""
    return subprocess.check_output(["git", "-C", checkout, "rev-parse", "--short", "HEAD"], text=True).strip()


def measured(checkouts: dict[str, Path], model: Path, data: Path, length: int, *, rounds: int) -> dict:
    """Return the seconds of each version, round by round, and the ratio of the medians."""
    seconds: dict[str, list[float]] = {name: [] for name in checkouts}
    for i in range(rounds):
        for name in list(checkouts)[:: -1 if i % 2 else 1]:
            seconds[name].append(round(cpu_seconds(checkouts[name], model, data, length), 2))
            print(model, name, seconds[name][-1], file=sys.stderr)
    before, now = (statistics.median(times) for times in seconds.values())
    return {"cpu_seconds": seconds, "now_over_before": round(now / before, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout of the other version")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path, default=HERE / "results/benchmarks/against.json")
    args = parser.parse_args()
    checkouts = {"before": args.before.resolve(), "now": HERE}
    for checkout in checkouts.values():
        compileall.compile_dir(checkout / "spd_calib", quiet=1)
    there = {name: of for name, of in MODELS.items() if of[0].exists() and of[1].exists()}
    for name in MODELS.keys() - there.keys():
        print(f"{name} is not here: left out", file=sys.stderr)
    found = {
        "command": "python benchmarks/against.py BEFORE",
        "commits": {name: commit(checkout) for name, checkout in checkouts.items()},
        "options": " ".join(OPTIONS),
        "models": {name: measured(checkouts, *of, rounds=args.rounds) for name, of in there.items()},
    }
    args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
