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
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
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


@dataclass(frozen=True)
class Usual:
    """A command when nothing disturbs it: how it ends, and what it writes, by output and file."""

    command: Command
    work: Path
    end: End
    expected: dict[str, dict[str, bytes]]

    @property
    def out(self) -> Path:
        return self.work / "out"


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
    err, said = os.pipe()  # no file: that would be limited, too
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    pid = os.fork()
    if pid == 0:
        _child(arguments, out, said, counted, at, number, file_size)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    os.close(said)
    if after is not None:
        while time.monotonic() - start < after:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break
            time.sleep(0.001)
        else:
            os.kill(pid, number)
    with open(err, errors="replace") as f:
        log.write_text(f.read())
    status = os.waitpid(pid, 0)[1]
    seconds = time.monotonic() - start
    operations = len(counted.read_bytes()) if counted.exists() else 0
    return End(os.waitstatus_to_exitcode(status), log.read_text(), seconds, operations)


def _child(
    arguments: list[str], out: Path, said: int, counted: Path, at: int | None, number: int, file_size: int | None
) -> None:
    """What the forked process does: the command, its stderr into `said`. Does not return."""
    code = 99
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(said, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        if file_size is None:
            _watch(str(out), counted, at, number)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
        sys.argv = ["spd-calib", *arguments]
        from spd_calib.cli.main import main

        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        main()
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
    except KeyboardInterrupt:  # before or behind all that main does
        os.write(2, f"{SENTENCE}interrupted.".encode())
        code = 130
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
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


def judge(usual: Usual, old: bytes | None, found: Found, end: End, codes: tuple[int, ...]) -> None:
    """Add to `found` what a try left, and what is wrong with it; `codes` are the exit codes it may have besides 0."""
    command, out, expected = usual.command, usual.out, usual.expected
    found.tries += 1
    wrong, hit = found.wrong, end.code != 0
    found.hit += hit
    if end.code not in (0, *codes):
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


def again(usual: Usual, found: Found) -> None:
    """The same command once more, undisturbed: it must end well, and its outputs be what they always are."""
    command, out, expected = usual.command, usual.out, usual.expected
    found.resumed += any(p.name.endswith(STATE) for p in out.iterdir())
    if command.name == "recover" and (out / command.writes["-o"]).exists():
        return  # it was done
    end = run(command.line(out), out, usual.work / "again.log")
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


def signals(usual: Usual, number: signal.Signals, count: int, timed: int, dice: random.Random) -> Found:
    """A signal at `count` operations on files and at `timed` random times."""
    command, out, undisturbed = usual.command, usual.out, usual.end
    found = Found(command.name, number.name)
    moments: list[tuple[int | None, float | None]] = [(k, None) for k in spread(undisturbed.operations, count)]
    moments += [(None, dice.uniform(0.0, undisturbed.seconds)) for _ in range(timed)]
    for i, (k, t) in enumerate(moments):
        operation = f"before operation {k} of {undisturbed.operations}"
        found.moments.append(operation if k else f"after {t:.2f} of {undisturbed.seconds:.2f} s")
        old = None if command.folder else (OLD, None)[i % 2]
        prepare(out, command, old)
        end = run(command.line(out), out, usual.work / "try.log", k, number, t)
        if command.name == "bench":
            wait_for_ranks(out, found)
        judge(usual, old, found, end, (130,) if number == signal.SIGINT else (-number,))
        again(usual, found)
    return found


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


def full(usual: Usual, count: int, mount: bool) -> Found:
    """A disk with too little room, at `count` levels from none to almost enough."""
    command, out = usual.command, usual.out
    sizes = [len(data) for files in usual.expected.values() for data in files.values()]
    found = Found(command.name, "full disk (tmpfs)" if mount else "full disk (RLIMIT_FSIZE)")
    prepare(out, command, None)
    for i in range(count):
        share = 0.98 * i / max(1, count - 1)
        found.moments.append(f"room for {100 * share:.0f} % of the output")
        old = None if command.folder else (OLD, None)[i % 2]
        if not mount:
            prepare(out, command, old)
            end = run(command.line(out), out, usual.work / "try.log", file_size=int(share * max(sizes)))
            judge(usual, old, found, end, (1,))
            again(usual, found)
            continue
        with small_disk(out, 4 * sum(sizes) + 2**21):
            prepare(out, command, old)
            filler = out / f"filler{STATE[0]}"  # by that name it is not judged
            filler.write_bytes(bytes(max(0, shutil.disk_usage(out).free - int(share * sum(sizes)))))
            end = run(command.line(out), out, usual.work / "try.log")
            judge(usual, old, found, end, (1,))
            filler.unlink()
            again(usual, found)
    return found


def two_at_once(usual: Usual, times: int, dice: random.Random) -> Found:
    """Two of the same command on one output, the second begun at a random moment of the first."""
    command, out, work, first = usual.command, usual.out, usual.work, usual.end
    found = Found(command.name, "two at once")
    for i in range(times):
        delay = 0.0 if i == 0 else dice.uniform(0, first.seconds)
        found.moments.append(f"the second {delay:.2f} of {first.seconds:.2f} s after the first")
        prepare(out, command, None)
        second: list[End] = []

        def later(delay: float = delay, second: list[End] = second) -> None:
            time.sleep(delay)
            second.append(run(command.line(out), out, work / "second.log"))

        thread = threading.Thread(target=later)
        thread.start()
        one = run(command.line(out), out, work / "try.log")
        thread.join()
        other = second[0]
        if one.code and other.code:
            found.wrong.append(f"both refused: {one.err[-200:]} {other.err[-200:]}")
        found.hit += bool(one.code or other.code)
        for end in (one, other):
            if end.code and ("Traceback" in end.err or SENTENCE not in end.err or end.code != 2):
                found.wrong.append(f"exit code {end.code}: {end.err[-300:]}")
        judge(usual, None, found, End(0, "", 0, 0), ())
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
        (work / "out").mkdir()
        for command in COMMANDS:
            if (options.only and command.name not in options.only) or (options.short and command.slow):
                continue
            words = [a.format(**{"in": folder}) for a in command.arguments]
            command = Command(**{**vars(command), "arguments": words})
            count, timed, levels, pairs = (3, 0, 2, 1) if options.short else (12, 12, 9, 5)
            if command.slow:
                count, timed, levels, pairs = 3, 4, 3, 1
            prepare(work / "out", command, None)
            undisturbed = run(command.line(work / "out"), work / "out", work / "first.log")
            assert undisturbed.code == 0, undisturbed.err
            usual = Usual(
                command, work, undisturbed, {n: content(work / "out" / n) or {} for n in command.writes.values()}
            )
            kinds = [mount] if options.short else [True, False] if mount else [False]
            for found in itertools.chain(
                (signals(usual, number, count, timed, dice) for number in (signal.SIGKILL, signal.SIGINT)),
                (full(usual, levels, on_tmpfs) for on_tmpfs in kinds),
                (two_at_once(usual, pairs, dice) for _ in range(not command.slow)),
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
