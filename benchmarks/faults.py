"""What every command that writes leaves when it is killed, interrupted or out of disk, and two at once.

    .venv/bin/python benchmarks/faults.py [--short] [--only COMMAND] [-o results/reliability/faults.json]

Each try is a process of its own: forked from one that has imported everything, so that many tries are cheap, with a
signal of its own from the kernel. Moments are of two kinds: before the k-th operation on files in the folder of the
output, for k spread over all of them (Python's audit events tell), and at random times over the whole run. The full
disk is a small tmpfs with little room left, or, where none can be mounted, a limit to the size of files
(RLIMIT_FSIZE). Every try is judged by `judge`: the old output or a whole new one; nothing else beside it but the state
to go on from; one sentence and the exit code; and the same command, given again, ends as if nothing had happened.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

OLD = b"what was there before\n"
STATE = (".journal", ".partial")  # kept on purpose, to go on from
LENGTHS = ["--seq-len", "32", "--max-samples", "8", "--verify-samples", "4", "--batch-size", "4"]
DEMO = ["demo", "--tp", "2", "--data", "demo", *LENGTHS, "--strategy", "block_drop"]
RECOVERY = ["--seq-len", "32", "--max-samples", "24", "--verify-samples", "4", "--batch-size", "4"]
RECOVERY += ["--steps", "2", "--final-steps", "2", "--tau1", "1e-7", "--tau2", "1e-6"]
SENTENCE = "spd-calib: "


@dataclass(frozen=True)
class Command:
    """`writes`: outputs, by the option that names them. `same`: the same bytes every time."""

    name: str
    arguments: list[str]
    writes: dict[str, str]
    same: bool = True
    folder: bool = False  # a folder, which must not be there before
    slow: bool = False
    state: str | None = None  # the suffix of what it keeps to go on from

    def line(self, out: Path) -> list[str]:
        return [*self.arguments, *(word for option, name in self.writes.items() for word in (option, str(out / name)))]


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
    Command("eval", ["eval", "{in}/plan.json", "--tasks", "demo", "--limit", "4"], {"-o": "results.json"}),
    Command("report", ["report", "{in}/profile.json", "--plan", "{in}/plan.json"], {"--png": "figure.png"}),
    Command(
        "bench",
        ["bench", "{in}/plan.json", "--rounds", "1", "--tokens", "8", "--new-tokens", "2"],
        {"-o": "hardware.json"},
        same=False,
        slow=True,
    ),
    Command("demo", ["demo"], {"-o": "demo"}, folder=True, slow=True),
]


@dataclass
class End:
    """How a process ended: its exit code (or minus its signal), its stderr, seconds, and operations on files seen."""

    code: int
    err: str
    seconds: float
    operations: int


@dataclass
class Found:
    """What one kind of fault did to one command."""

    command: str
    fault: str
    moments: list[str] = field(default_factory=list)
    tries: int = 0
    hit: int = 0  # the command had not ended by itself
    old: int = 0
    new: int = 0
    resumed: int = 0  # of those run again, how many had a state to go on from
    litter_after_kill: int = 0
    wrong: list[str] = field(default_factory=list)


def run(
    arguments: list[str], out: Path, log: Path, at: int | None = None, number: int = 0, after: float | None = None,
    file_size: int | None = None,
) -> End:  # fmt: skip
    """`spd-calib ARGUMENTS` in a forked process, which gets signal `number` before its `at`-th operation in `out`, or
    `after` seconds; `file_size` limits the files it writes."""
    start = time.monotonic()
    counted = log.with_suffix(".operations")
    pid = os.fork()
    if pid == 0:
        _child(arguments, out, log, counted, at, number, file_size)
    if after is not None:
        while time.monotonic() - start < after:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break
            time.sleep(0.001)
        else:
            os.kill(pid, number)
    status = os.waitpid(pid, 0)[1]
    seconds = time.monotonic() - start
    operations = len(counted.read_bytes()) if counted.exists() else 0
    return End(os.waitstatus_to_exitcode(status), log.read_text(errors="replace"), seconds, operations)


def _child(
    arguments: list[str], out: Path, log: Path, counted: Path, at: int | None, number: int, file_size: int | None
) -> None:
    code = 99
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        where = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(where, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        _watch(str(out), counted, at, number)
        if file_size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
        sys.argv = ["spd-calib", *arguments]
        from spd_calib.cli.main import main

        main()
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _watch(out: str, counted: Path, at: int | None, number: int) -> None:
    """Count what this process does to files below `out`, and send it the signal before the `at`-th."""
    tally = os.open(counted, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    events = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "shutil.rmtree"}
    seen = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal seen
        if event in events and args and isinstance(args[0], str | os.PathLike) and os.fspath(args[0]).startswith(out):
            seen += 1
            os.write(tally, b".")
            if seen == at:
                os.kill(os.getpid(), number)

    sys.addaudithook(hook)


def content(path: Path) -> dict[str, bytes] | None:
    """Every file of an output, by name; None where there is nothing."""
    if path.is_file():
        return {"": path.read_bytes()}
    return (
        {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}
        if path.exists()
        else None
    )


def whole(name: str, data: bytes) -> bool:
    """Can the file be read, to its end?"""
    from safetensors.torch import load

    from spd_calib.formats.files import FORMATS

    try:
        if name.endswith(".safetensors"):
            return bool(load(data))
        if name.endswith(".json"):
            document = json.loads(data)
            kind = str(document.get("format", "")).removeprefix("spd-calib/")
            return kind not in FORMATS or bool(FORMATS[kind].model_validate_json(data))
        return data.endswith(b"IEND\xaeB\x60\x82") if name.endswith(".png") else len(data) > 0
    except Exception:
        return False


def judge(
    command: Command, out: Path, old: bytes | None, expected: dict[str, dict[str, bytes]], found: Found, end: End,
    allowed_codes: tuple[int, ...],
) -> None:  # fmt: skip
    """Add to `found` what a try left in `out`, and what is wrong with it."""
    found.tries += 1
    wrong, hit = found.wrong, end.code != 0
    found.hit += hit
    if end.code not in (0, *allowed_codes):
        wrong.append(f"exit code {end.code}: {end.err.strip().splitlines()[-1:]}")
    if hit and end.code >= 0:
        sentences = [line for line in end.err.splitlines() if line.startswith(SENTENCE)]
        if len(sentences) != 1 or "Traceback" in end.err:
            wrong.append(f"exit code {end.code} with {len(sentences)} sentences: {end.err.strip()[-300:]}")
    new = 0
    for name in command.writes.values():
        now = content(out / name)
        is_old = now == (None if old is None else {"": old})
        is_new = not is_old and now is not None and all(whole(f or name, data) for f, data in now.items())
        if is_new and now is not None:
            if command.name != "demo" and set(now) != set(expected[name]):
                is_new = False  # a folder that lacks files
            elif command.same and not command.folder and now != expected[name]:
                is_new = False
        if not is_old and not is_new:
            wrong.append(f"{name} is neither the old nor a whole new one ({end.code})")
        if not hit and is_old:
            wrong.append(f"{name} was not written, with exit code 0")
        new += is_new
    found.new, found.old = found.new + bool(new), found.old + (not new)
    litter = [p.name for p in out.iterdir() if p.name not in command.writes.values() and not p.name.endswith(STATE)]
    if command.name == "demo" and (out / "demo").is_dir():
        litter += [p.name for p in (out / "demo").iterdir() if p.name.startswith(".")]
    if litter and end.code == -signal.SIGKILL:
        found.litter_after_kill += 1
        for name in litter:
            if not name.startswith("."):
                wrong.append(f"{name} was left behind")
    elif litter:
        wrong.append(f"{litter} was left behind with exit code {end.code}")


def again(command: Command, out: Path, work: Path, expected: dict[str, dict[str, bytes]], found: Found) -> None:
    """The same command once more, undisturbed: it must end well, and its outputs be what they always are."""
    found.resumed += any(p.name.endswith(STATE) for p in out.iterdir())
    if command.name == "recover" and (out / command.writes["-o"]).exists():
        return  # it was done
    end = run(command.line(out), out, work / "again.log")
    if end.code != 0:
        found.wrong.append(f"run again, exit code {end.code}: {end.err.strip()[-300:]}")
        return
    for name in command.writes.values():
        now = content(out / name)
        assert now is not None
        if command.same and not command.folder and now != expected[name]:
            found.wrong.append(f"run again, {name} is another")
        if command.name == "recover":  # seconds stand in recovery.json
            differing = [f for f in now if f != "recovery.json" and now[f] != expected[name].get(f)]
            if differing:
                found.wrong.append(f"run again, {differing} are others")
    left = [p.name for p in out.iterdir() if p.name.endswith(STATE)]
    if left:
        found.wrong.append(f"run again, {left} is left")


def prepare(out: Path, command: Command, old: bytes | None) -> None:
    for path in out.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if old is not None:
        for name in command.writes.values():
            (out / name).write_bytes(old)


@contextmanager
def small_disk(out: Path, room: int) -> Iterator[None]:
    """`out` is a tmpfs while this lasts. Raises OSError where none can be mounted."""
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", out], capture_output=True)
    if done.returncode:
        raise OSError(done.stderr.decode())
    try:
        yield
    finally:
        subprocess.run(["umount", out], check=True)


def can_mount() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        try:
            with small_disk(Path(folder), 2**16):
                return True
        except OSError:
            return False


def spread(n: int, count: int) -> list[int]:
    """At most `count` numbers from 1 to n, evenly spread, both ends among them."""
    return sorted({round(1 + i * (n - 1) / max(1, count - 1)) for i in range(min(n, count))})


def signals(command: Command, work: Path, count: int, timed: int, dice: random.Random) -> list[Found]:
    """SIGKILL and SIGINT at `count` operations on files and `timed` random times each."""
    out = work / "out"
    out.mkdir(exist_ok=True)
    prepare(out, command, None)
    undisturbed = run(command.line(out), out, work / "first.log")
    assert undisturbed.code == 0, undisturbed.err
    expected = {name: content(out / name) or {} for name in command.writes.values()}
    rows = []
    for number, codes in ((signal.SIGKILL, (-signal.SIGKILL,)), (signal.SIGINT, (130,))):
        found = Found(command.name, signal.Signals(number).name)
        moments: list[tuple[int | None, float | None]] = [(k, None) for k in spread(undisturbed.operations, count)]
        moments += [(None, dice.uniform(0.0, undisturbed.seconds)) for _ in range(timed)]
        found.moments = [
            f"before operation {k} of {undisturbed.operations}"
            if k
            else f"after {t:.2f} of {undisturbed.seconds:.2f} s"
            for k, t in moments
        ]
        for i, (k, t) in enumerate(moments):
            old = None if command.folder else (OLD, None)[i % 2]
            prepare(out, command, old)
            end = run(command.line(out), out, work / "try.log", k, number, t)
            if command.name == "bench":
                wait_for_ranks(out, found)
            judge(command, out, old, expected, found, end, codes)
            again(command, out, work, expected, found)
        rows.append(found)
    return rows


def wait_for_ranks(out: Path, found: Found, seconds: float = 15) -> None:
    """The ranks that a bench started must end with it."""
    end = time.monotonic() + seconds
    while ranks := processes_naming(str(out)):
        if time.monotonic() > end:
            found.wrong.append(f"{len(ranks)} ranks still run {seconds:.0f} s later")
            for pid in ranks:
                os.kill(pid, signal.SIGKILL)
            return
        time.sleep(0.2)


def processes_naming(word: str) -> list[int]:
    """Processes with `word` in their command line, other than this one: the forked ones have this one's."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in path.read_bytes() and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def full(command: Command, work: Path, count: int, mount: bool) -> Found:
    """A disk with too little room, at `count` levels from none to almost enough."""
    out = work / "out"
    out.mkdir(exist_ok=True)
    prepare(out, command, None)
    assert run(command.line(out), out, work / "first.log").code == 0
    expected = {name: content(out / name) or {} for name in command.writes.values()}
    size = sum(len(data) for files in expected.values() for data in files.values())
    largest = max(len(data) for files in expected.values() for data in files.values())
    prepare(out, command, None)
    found = Found(command.name, "full disk (tmpfs)" if mount else "full disk (RLIMIT_FSIZE)")
    for i in range(count):
        share = 0.98 * i / max(1, count - 1)
        found.moments.append(f"room for {100 * share:.0f} % of the output")
        old = None if command.folder else (OLD, None)[i % 2]
        if mount:
            with small_disk(out, 4 * size + 2**21):
                prepare(out, command, old)
                free = shutil.disk_usage(out).free
                filler = work / "filler"
                with open(out / ".filler", "wb") as f:
                    f.write(bytes(max(0, free - int(share * size))))
                end = run(command.line(out), out, work / "try.log")
                (out / ".filler").rename(out / "filler.journal")  # not judged
                judge(command, out, old, expected, found, end, (1,))
                (out / "filler.journal").unlink()
                again(command, out, work, expected, found)
                del filler
        else:
            prepare(out, command, old)
            end = run(command.line(out), out, work / "try.log", file_size=int(share * largest))
            judge(command, out, old, expected, found, end, (1,))
            again(command, out, work, expected, found)
    return found


def two_at_once(command: Command, work: Path, times: int, dice: random.Random) -> Found:
    """Two of the same command on one output, the second begun at a random moment of the first."""
    out = work / "out"
    out.mkdir(exist_ok=True)
    prepare(out, command, None)
    first = run(command.line(out), out, work / "first.log")
    expected = {name: content(out / name) or {} for name in command.writes.values()}
    found = Found(command.name, "two at once")
    for i in range(times):
        delay = 0.0 if i == 0 else dice.uniform(0, first.seconds)
        found.moments.append(f"the second {delay:.2f} of {first.seconds:.2f} s after the first")
        prepare(out, command, None)
        pid = os.fork()
        if pid == 0:
            time.sleep(delay)
            _child(command.line(out), out, work / "second.log", work / "second.operations", None, 0, None)
        one = run(command.line(out), out, work / "try.log")
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        other = End(code, (work / "second.log").read_text(errors="replace"), 0.0, 0)
        if one.code and other.code:
            found.wrong.append(f"both refused: {one.err[-200:]} {other.err[-200:]}")
        found.hit += bool(one.code or other.code)
        for end in (one, other):
            if end.code and ("Traceback" in end.err or SENTENCE not in end.err or end.code != 2):
                found.wrong.append(f"exit code {end.code}: {end.err[-300:]}")
        judge(command, out, None, expected, found, End(0, "", 0, 0), ())
        left = [p.name for p in out.iterdir() if p.name.endswith(STATE)]
        if left:
            found.wrong.append(f"{left} is left")
    return found


def inputs(work: Path) -> Path:
    """A profile and a plan of the shipped model, for the commands that read them."""
    folder = work / "in"
    folder.mkdir()
    for arguments in (
        ["profile", *DEMO, "-o", str(folder / "profile.json")],
        ["plan", str(folder / "profile.json"), "--drop", "2", "-o", str(folder / "plan.json")],
    ):
        end = run(arguments, folder, work / "inputs.log")
        assert end.code == 0, end.err
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", type=Path)
    parser.add_argument("--only", action="append", help="A command by name; repeatable.")
    parser.add_argument("--short", action="store_true", help="A few moments of each; bench and demo left out.")
    options = parser.parse_args()
    imports()
    dice, rows, mount = random.Random(0), list[Found](), can_mount()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        folder = inputs(work)
        for command in COMMANDS:
            if (options.only and command.name not in options.only) or (options.short and command.slow):
                continue
            words = [a.format(**{"in": folder}) for a in command.arguments]
            command = Command(**{**vars(command), "arguments": words})
            count, timed, levels, pairs = (3, 0, 2, 1) if options.short else (12, 12, 9, 5)
            if command.slow:
                count, timed, levels, pairs = 3, 4, 3, 1
            for found in (
                *signals(command, work, count, timed, dice),
                *(full(command, work, levels, on_tmpfs) for on_tmpfs in ([mount] if options.short else {mount, False})),
                *([two_at_once(command, work, pairs, dice)] if not command.slow else []),
            ):
                rows.append(found)
                print(
                    f"{found.command}, {found.fault}: {found.tries} tries, {found.hit} hit, {found.old} old, ", end=""
                )
                print(f"{found.new} new, {len(found.wrong)} wrong", *found.wrong, sep="\n    ", flush=True)
    if options.o:
        options.o.write_text(json.dumps([vars(row) for row in rows], indent=1) + "\n")
    raise SystemExit(any(row.wrong for row in rows))


def imports() -> None:
    """Everything heavy, once, before the forks."""
    import lm_eval.evaluator
    import lm_eval.models.huggingface
    import lm_eval.tasks
    import matplotlib.pyplot
    import torch
    import transformers

    from spd_calib.cli import main
    from spd_calib.evaluation import harness
    from spd_calib.recovery import checkpoint, recover
    from spd_calib.sensitivity import fisher, profile

    torch.set_num_threads(1)
    del lm_eval, matplotlib, transformers, main, harness, checkpoint, recover, fisher, profile


if __name__ == "__main__":
    main()
