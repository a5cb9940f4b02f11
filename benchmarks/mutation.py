"""Which changes of the code would the tests not notice? mutmut over parallel/, planning/, the metrics and the drops.

    make mutation                                  # EVERY=1: every mutant; 2: every second, ... (an hour on one core)
    .venv/bin/python benchmarks/mutation.py --lived    # those of the record that lived, once more: after new tests
    .venv/bin/python benchmarks/mutation.py --report

Works on a copy of the tree in runs/mutation/tree; which tests take part stands in pyproject.toml. The record goes to
results/mutation/record.json; with --report results/mutation/README.md is written from it alone: the share killed of
every module, and every mutant that lived, with the reason that results/mutation/explained.yaml gives for its change.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
TREE = ROOT / "runs" / "mutation" / "tree"
LOG = ROOT / "runs" / "mutation" / "mutmut.log"
KEPT = ROOT / "results" / "mutation"
STATUS = {0: "survived", 33: "no test reaches it", 5: "no test reaches it"}  # mutmut's exit codes; the rest: killed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="of the mutants, in the order of the files")
    parser.add_argument("--only", default="", help="modules whose name this finds; the others' record stays")
    parser.add_argument("--lived", action="store_true", help="those that lived, of modules that have not changed since")
    parser.add_argument("--report", action="store_true", help="write the report from the record, run nothing")
    args = parser.parse_args()
    if not args.report:
        copy_tree()
        mutmut("spd_calib.sensitivity.metrics.x_perplexity__mutmut_1")  # makes the mutants, times the tests
        names = lived(args.only) if args.lived else sample(args.every, args.only)
        if not names:
            raise SystemExit("There is no such mutant to try.")
        mutmut(*names)
        keep(set(names), args.every, args.lived)
    (KEPT / "README.md").write_text(report(json.loads((KEPT / "record.json").read_text())), encoding="utf-8")


def copy_tree() -> None:
    """Copy the files that git knows or would add, as they are now."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    shutil.rmtree(TREE, ignore_errors=True)
    for name in listed:
        if (ROOT / name).is_file():
            (TREE / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, TREE / name)


def mutmut(*names: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [str(Path(sys.executable).parent / "mutmut"), "run", "--max-children", "1", *names]
    with LOG.open("w", encoding="utf-8") as log:
        done = subprocess.run(command, cwd=TREE, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
    if done:  # the tests must pass before anything is mutated; a mutant that lives is no error
        raise SystemExit(f"mutmut ended with {done}; {LOG} says why. The record is as it was.")


def sample(every: int, only: str) -> list[str]:
    """Return the names of the mutants to try: one in `every` of each module."""
    modules = [list(exits) for module, exits in metas() if re.search(only, module)]
    return [name for names in modules for name in names[::every]]


def lived(only: str) -> list[str]:
    """Return the names of the mutants that lived, of modules that have as many as then."""
    record, now = json.loads((KEPT / "record.json").read_text())["modules"], {m: len(exits) for m, exits in metas()}
    same = [found for m, found in record.items() if re.search(only, m) and found["mutants"] == now.get(m)]
    return [mutant["mutant"] for found in same for mutant in found["lived"]]


def metas() -> list[tuple[str, dict[str, int | None]]]:
    """Return mutmut's exit code of every mutant, by module."""
    files = sorted((TREE / "mutants" / "spd_calib").rglob("*.py.meta"))
    found = [
        (f.relative_to(TREE / "mutants").as_posix().removesuffix(".meta"), json.loads(f.read_text())) for f in files
    ]
    return [(name, meta["exit_code_by_key"]) for name, meta in found if meta["exit_code_by_key"]]


def keep(tried: set[str], every: int, again: bool) -> None:
    """Add what was found to the record: in place of a module's earlier result, or, tried `again`, within it.

    What is recorded of modules that are gone is left out.
    """
    path = KEPT / "record.json"
    record = json.loads(path.read_text()) if path.exists() else {"modules": {}}
    record["modules"] = {module: found for module, found in record["modules"].items() if (ROOT / module).is_file()}
    for module, exits in metas():
        mine = {name: code for name, code in exits.items() if name in tried and code is not None}
        if mine:
            before = record["modules"][module] if again else {}
            untried = [mutant for mutant in before.get("lived", []) if mutant["mutant"] not in mine]
            alive = [name for name, code in mine.items() if code in STATUS]
            tried_of_all = before.get("tried", len(mine))
            record["modules"][module] = {
                "mutants": len(exits),
                "tried": tried_of_all,
                "every": before.get("every", every),
                "killed": tried_of_all - len(alive) - len(untried),
                "lived": [{"mutant": n, "status": STATUS[mine[n]], "diff": diff(module, n)} for n in alive] + untried,
            }
    record |= {"mutmut": version("mutmut"), "date": datetime.now(UTC).date().isoformat()}
    KEPT.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def diff(module: str, name: str) -> list[str]:
    """Return the lines that the mutant takes out and puts in."""
    code = f"from mutmut.mutation.diff_apply import get_diff_for_mutant as d; print(d({name!r}, path={module!r}))"
    out = subprocess.run([sys.executable, "-c", code], cwd=TREE, capture_output=True, text=True, check=True).stdout
    lines = [line for line in out.splitlines() if line[:1] in "+-" and not line.startswith(("+++", "---"))]
    return [line[0] + line[1:].strip() for line in lines]


def report(record: dict) -> str:
    reasons = yaml.safe_load((KEPT / "explained.yaml").read_text(encoding="utf-8")) or []
    parts = [
        "<!-- written by benchmarks/mutation.py: make mutation -->\n\n# Mutants\n\n",
        f"mutmut {record['mutmut']}, {record['date']}; `make mutation`, or `make mutation EVERY=3`: every third one. "
        "A mutant is a small change of the code; it is killed where a test then fails.\n\n"
        "| module | mutants | tried | killed | lived, explained | lived |\n",
        "|---|---|---|---|---|---|\n",
    ]
    total = {"mutants": 0, "tried": 0, "killed": 0, "explained": 0}
    lists = []
    for module, found in sorted(record["modules"].items()):
        why = [(m, explanation(module, m, reasons)) for m in found["lived"]]
        explained = sum(reason is not None for _, reason in why)
        row = {**{k: found[k] for k in ("mutants", "tried", "killed")}, "explained": explained}
        total = {k: total[k] + row[k] for k in total}
        parts.append(_row(f"`{module}`", row))
        if why:
            lists.append(f"\n## {module}\n\n" + "".join(_line(m, reason) for m, reason in why))
    parts.append(_row("all", total))
    return "".join([*parts, "\nWhat lived, and why nothing fails:\n", *lists])


def _row(name: str, row: dict[str, int]) -> str:
    lived = row["tried"] - row["killed"]
    share = f"{row['killed']} ({100 * row['killed'] / row['tried']:.1f} %)"
    return (
        f"| {name} | {row['mutants']} | {row['tried']} | {share} | {row['explained']} | {lived - row['explained']} |\n"
    )


def _line(mutant: dict, reason: str | None) -> str:
    change = "; ".join(f"`{line}`" for line in mutant["diff"] if line[0] == "+") or "`a line less`"
    number = mutant["mutant"].rsplit(".x", 1)[1].replace("__mutmut_", " ").strip("_ǁ").replace("ǁ", ".")
    return f"- {number}: {change}: {reason or '**' + mutant['status'] + '**'}\n"


def explanation(module: str, mutant: dict, reasons: list[dict]) -> str | None:
    """Return the first reason whose module, function and change match."""
    text = "\n".join(mutant["diff"])
    for rule in reasons:
        if re.search(rule.get("in", ""), f"{module} {mutant['mutant']}") and re.search(rule["change"], text):
            return rule["why"]
    return None


if __name__ == "__main__":
    main()
