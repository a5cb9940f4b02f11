"""What every command that writes leaves when it is killed, interrupted or out of disk, two at once, or a rank dies.

    make faults
    .venv/bin/python benchmarks/faults.py [--short] [--only COMMAND] [-o results/reliability/faults.json]

Each try is a process of its own: forked from one that has imported everything, so that many tries are cheap, with a
signal of its own from the kernel. Moments are of two kinds: before the k-th operation on files in the folder of the
output, for k spread over all of them (Python's audit events tell), and at random times over the whole run; of a
profile also at random times from the first line of its journal on. The full disk is a small tmpfs with little room
left, where one can be mounted, and a limit to the size of files (RLIMIT_FSIZE). Of ranks under torchrun one is killed,
or torchrun itself. Every try is judged (fault_kinds.py): the old output or a whole new one; nothing else beside it but
the state to go on from; one sentence and the exit code; and the same command, given again, ends as if nothing had
happened. Beside the JSON file README.md is written from it.
"""

import argparse
import json
import os
import platform
import random
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from fault_kinds import Command, Found, Usual, content, full, prepare, signals, two_at_once, while_measuring
from fault_ranks import Ranks, dying
from fault_runs import can_mount, imports, run

LENGTHS = ["--seq-len", "32", "--max-samples", "8", "--verify-samples", "4", "--batch-size", "4"]
DEMO = ["demo", "--tp", "2", "--data", "demo", *LENGTHS, "--strategy", "block_drop"]
RECOVERY = ["--seq-len", "32", "--max-samples", "24", "--verify-samples", "4", "--batch-size", "4"]
RECOVERY += ["--steps", "2", "--final-steps", "2", "--tau1", "1e-7", "--tau2", "1e-6"]
COMMANDS = [
    Command("profile", ["profile", *DEMO], {"-o": "profile.json"}, state=".journal"),
    Command(
        "profile --method fisher",
        ["profile", *DEMO, "--method", "fisher", "--target-stderr", "0.5"],
        {"-o": "profile.json"},
        state=".journal",
    ),
    Command("plan", ["plan", "{in}/profile.json", "--drop", "2"], {"-o": "plan.json"}),
    Command(
        "plan --pareto", ["plan", "{in}/profile.json", "--drop", "2"], {"--pareto": "front.json", "-o": "plan.json"}
    ),
    Command(
        "recover",
        ["recover", "{in}/plan.json", "--data", "demo", *RECOVERY],
        {"-o": "recovered"},
        folder=True,
        state=".partial",
    ),
    Command(
        "eval",
        ["eval", "{in}/plan.json", "--tasks", "demo", "--limit", "4"],
        {"-o": "results.json"},
        state=".journal",
    ),
    Command("report", ["report", "{in}"], {"-o": "page.html", "--png": "figure.png"}),
    Command(
        "bench",
        ["bench", "{in}/plan.json", "--rounds", "1", "--tokens", "8", "--new-tokens", "2"],
        {"-o": "hardware.json"},
        same=False,
        slow=True,
    ),
    Command("demo", ["demo"], {"-o": "demo"}, folder=True, slow=True),
]
ON_RANKS = [
    Ranks(Command("torchrun profile", ["profile", *DEMO], {"-o": "profile.json"}, same=False, state=".journal")),
    Ranks(Command("torchrun generate", ["generate", "{in}/plan.json", "--prompt", "One day"], {})),
    Ranks(
        Command(
            "torchrun recover",
            ["recover", "{in}/plan.json", "--data", "demo", *RECOVERY],
            {"-o": "recovered"},
            same=False,
            folder=True,
            state=".partial",
        )
    ),
    Ranks(Command("check --runtime torchrun", ["check", "{in}/plan.json", "--runtime", "torchrun"], {}), itself=True),
]
VICTIMS = ["rank 0", "rank 1"] * 2 + ["torchrun"]


def inputs(work: Path) -> Path:
    """Make a profile and a plan of the shipped model, for the commands that read them."""
    folder = work / "in"
    folder.mkdir()
    for arguments in (
        ["profile", *DEMO, "-o", str(folder / "profile.json")],
        ["plan", str(folder / "profile.json"), "--drop", "2", "-o", str(folder / "plan.json")],
    ):
        end = run(arguments, folder, work / "inputs.log")
        assert end.code == 0, end.err
    return folder


def placed(command: Command, folder: Path) -> Command:
    return replace(command, arguments=[word.format(**{"in": folder}) for word in command.arguments])


def usual_of(command: Command, work: Path) -> Usual:
    """Run the command once, undisturbed."""
    out = work / "out"
    prepare(out, command, None)
    end = run(command.line(out), out, work / "first.log")
    assert end.code == 0, end.err
    return Usual(command, work, end, {n: content(out / n) or {} for n in command.writes.values()})


def tries(command: Command, work: Path, short: bool, mount: bool, dice: random.Random) -> Iterator[Found]:
    """Do every kind of fault to one command."""
    count, timed, levels, pairs, measuring = (3, 0, 2, 1, 2) if short else (8, 8, 5, 3, 12)
    if command.slow:
        count, timed, levels, pairs = 2, 3, 2, 0
    usual = usual_of(command, work)
    for number in (signal.SIGKILL, signal.SIGINT):
        yield signals(usual, number, count, timed, dice)
    if command.state == ".journal":
        yield while_measuring(usual, measuring, dice)
    for on_tmpfs in [mount] if short else [True, False] if mount else [False]:
        yield full(usual, levels, on_tmpfs)
    if pairs:
        yield two_at_once(usual, pairs, dice)


def all_tries(only: list[str] | None, short: bool, work: Path) -> Iterator[Found]:
    """Try all commands, or those of `only`; `short`: a few moments of each, without the slow ones and the ranks."""
    dice, mount, folder = random.Random(0), can_mount(), inputs(work)
    (work / "out").mkdir()
    for command in COMMANDS:
        if command.name in only if only else not (short and command.slow):
            yield from tries(placed(command, folder), work, short, mount, dice)
    for ranks in ON_RANKS:
        if ranks.command.name in only if only else not short:
            yield from dying(replace(ranks, command=placed(ranks.command, folder)), work, VICTIMS, dice)


def report(document: dict) -> str:
    """Return README.md, made of what stands in faults.json."""
    rows = document["rows"]
    lines = [
        f"| {r['command']} | {r['fault']} | {r['tries']} | {r['hit']} | {r['old']} | {r['new']} | {r['resumed']} | "
        f"{'' if r['slowest'] is None else r['slowest']} | {len(r['wrong']) or 'nothing'} |"
        for r in rows
    ]
    left_out = {c.name for c in COMMANDS} | {r.command.name for r in ON_RANKS}
    left_out -= {r["command"] for r in rows}
    wrong = [f"- {r['command']}, {r['fault']}: {text}" for r in rows for text in r["wrong"]]
    return (
        HEAD.format(tries=sum(r["tries"] for r in rows), hit=sum(r["hit"] for r in rows), machine=document["machine"])
        + "\n".join(lines)
        + (f"\n\nNot tried: {', '.join(sorted(left_out))}." if left_out else "")
        + ("\n\n## Wrong\n\n" + "\n".join(wrong) if wrong else "")
        + "\n"
    )


HEAD = """# Faults in the middle of every command that writes

    make faults

wrote `faults.json` and, from it, this page: {tries} tries, of which {hit} ended the command before its end
({machine}).

What a try must leave: the old output or a whole new one, never a torn one; beside it nothing but the state to go on
from (`.journal`, `.partial`), after SIGKILL a hidden temporary file at most; one sentence and the exit code (130 for
SIGINT, 1 for a full disk). The same command given again must end well, with the same bytes where it writes the same
every time, also where it goes on from the state of the killed one. The moments of all tries stand in `faults.json`.

What was done:

- SIGKILL and SIGINT before the k-th operation on files in the output's folder, for k spread over all of them, and at
  random times over the whole run.
- SIGKILL of a profile or an eval at random times from the first line of its journal on: the file that went on from it
  is the same.
- A full disk: a tmpfs with too little room for the output, and a limit to the size of files (RLIMIT_FSIZE).
- Two of the same command on one output, the second begun at a random moment of the first: one may be refused.
- On two ranks: SIGKILL of one of them, or of torchrun, at random times. All others must end within 30 s, the exit code
  must not be 0, with one sentence at most (torchrun may be quicker, and names the signal itself; `check`, which starts
  torchrun, says one sentence). No process may be left.

`diff`, `generate`, `check` and `lm-eval` write no file of their own. NaN and Inf in weights and logits are tried by
`tests/test_nonfinite.py`: every command names the block where they first appear.

Found by such tries, and mended: a full disk ended with exit code 2, as if the input were wrong; the state of a
recovery killed as it began was refused afterwards, and two recoveries could share it; an interrupt went without a
sentence; tensors that were too large for a limit to the size of files ended with exit code 2; ranks that were
starting when torchrun was killed were still there half a minute later; those of a bench that was killed ran on and
wrote its file; a rank that lost torchrun could say two sentences.

| command | fault | tries | hit | old left | new left | went on from state | slowest end, s | wrong |
|---|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", type=Path, help="Its rows of the commands tried are replaced; README.md goes beside it.")
    parser.add_argument("--only", action="append", help="A command by name; repeatable.")
    parser.add_argument("--short", action="store_true", help="A few moments of each; slow ones and ranks left out.")
    options = parser.parse_args()
    imports()
    rows: list[Found] = []
    with tempfile.TemporaryDirectory() as name:
        for found in all_tries(options.only, options.short, Path(name)):
            rows.append(found)
            print(f"{found.command}, {found.fault}: {found.tries} tries, {found.hit} hit, {found.old} old, ", end="")
            print(f"{found.new} new, {len(found.wrong)} wrong", *found.wrong, sep="\n    ", flush=True)
            if options.o:
                keep(options.o, rows)
    raise SystemExit(any(row.wrong for row in rows))


def keep(path: Path, rows: list[Found]) -> None:
    """Write results into the file, in place of what it says of these commands."""
    tried = {row.command for row in rows}
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    names = [c.name for c in COMMANDS] + [r.command.name for r in ON_RANKS]
    every = [row for row in before if row["command"] not in tried] + [asdict(row) for row in rows]
    every.sort(key=lambda row: names.index(row["command"]))
    machine = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, {os.cpu_count()} cores"
    document = {"machine": machine, "rows": every}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    path.with_name("README.md").write_text(report(document))


if __name__ == "__main__":
    main()
