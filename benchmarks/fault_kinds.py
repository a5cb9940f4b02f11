"""Kinds of faults, and the judge of what each try leaves; benchmarks/faults.py says which commands they are done to."""

import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fault_runs import SENTENCE, End, processes_naming, run, small_disk

OLD = b" \n"  # what was there before: over a file of another kind no command would write
STATE = (".journal", ".partial")  # kept on purpose, to go on from


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
    slowest: float | None = None  # seconds from the fault to the end of all processes, where there are several
    wrong: list[str] = field(default_factory=list)


def content(path: Path) -> dict[str, bytes] | None:
    """Return the content of every file of an output, by name; None where there is nothing."""
    if path.is_file():
        return {"": path.read_bytes()}
    return (
        {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}
        if path.exists()
        else None
    )


def whole(name: str, data: bytes) -> bool:
    """Tell whether the file can be read to its end."""
    from safetensors.torch import load

    from spd_calib.formats.files import FORMATS

    try:
        if name.endswith(".safetensors"):
            return bool(load(data))
        if name.endswith(".json"):
            document = json.loads(data)
            kind = str(document.get("format", "")).removeprefix("spd-calib/")
            return kind not in FORMATS or bool(FORMATS[kind].model_validate_json(data))
        if name.endswith(".html"):
            return data.rstrip().endswith(b"</html>")
        return data.endswith(b"IEND\xaeB\x60\x82") if name.endswith(".png") else len(data) > 0
    except Exception:
        return False


def judge(usual: Usual, old: bytes | None, found: Found, end: End, codes: tuple[int, ...]) -> None:
    """Add to `found` what a try left, and what is wrong with it; `codes` are the exit codes it may have besides 0."""
    found.tries += 1
    wrong, hit = found.wrong, end.code != 0
    found.hit += hit
    if end.code not in (0, *codes):
        wrong.append(f"exit code {end.code}: {end.err.strip().splitlines()[-1:]}")
    if hit and end.code >= 0:
        sentences = [line for line in end.err.splitlines() if line.startswith(SENTENCE)]
        if len(sentences) != 1 or "Traceback" in end.err:
            wrong.append(f"exit code {end.code} with {len(sentences)} sentences: {end.err.strip()[-300:]}")
    look(usual, old, found, end)


def look(usual: Usual, old: bytes | None, found: Found, end: End) -> None:
    """Judge what a try left of the files."""
    command, out, expected = usual.command, usual.out, usual.expected
    wrong, hit = found.wrong, end.code != 0
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


def again(usual: Usual, found: Found, once_more: Callable[[], End] | None = None) -> None:
    """Run the same command once more, undisturbed: it must end well, with its usual outputs."""
    command, out, expected = usual.command, usual.out, usual.expected
    found.resumed += any(p.name.endswith(STATE) for p in out.iterdir())
    if command.name.endswith("recover") and (out / command.writes["-o"]).exists():
        return  # it was done
    end = once_more() if once_more else run(command.line(out), out, usual.work / "again.log")
    if end.code != 0:
        found.wrong.append(f"run again, exit code {end.code}: {end.err.strip()[-300:]}")
        return
    for name in command.writes.values():
        now = content(out / name)
        assert now is not None
        if command.same and not command.folder and now != expected[name]:
            found.wrong.append(f"run again, {name} is another")
        if command.name.endswith("recover"):  # seconds stand in recovery.json
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


def spread(n: int, count: int) -> list[int]:
    """Return at most `count` numbers from 1 to n, evenly spread, both ends among them."""
    return sorted({round(1 + i * (n - 1) / max(1, count - 1)) for i in range(min(n, count))})


def signals(usual: Usual, number: signal.Signals, count: int, timed: int, dice: random.Random) -> Found:
    """Send a signal at `count` operations on files and at `timed` random times."""
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
            wait_for_ranks(usual.work, found)
        judge(usual, old, found, end, (130,) if number == signal.SIGINT else (-number,))
        again(usual, found)
    return found


def while_measuring(usual: Usual, times: int, dice: random.Random) -> Found:
    """Send SIGKILL at random times from the journal's first line on, until `times` of them have hit."""
    command, out = usual.command, usual.out
    found = Found(command.name, "SIGKILL while it measures")
    journal, span = out / f"{command.writes['-o']}{command.state}", usual.end.seconds
    while found.hit < times and found.tries < 4 * times:
        t = dice.uniform(0, span)
        old = (OLD, None)[found.tries % 2]
        prepare(out, command, old)
        end = run(command.line(out), out, usual.work / "try.log", number=signal.SIGKILL, after=t, since=journal)
        judge(usual, old, found, end, (-signal.SIGKILL,))
        if end.code == 0:
            span = t  # there is not so much of it
        else:
            lines = len(journal.read_bytes().splitlines()) - 1 if journal.exists() else 0
            found.moments.append(f"{1e3 * t:.0f} ms after the journal's first line, {lines} measurements in it")
        again(usual, found)
    return found


def wait_for_ranks(work: Path, found: Found, seconds: float = 15) -> None:
    """Wait until the ranks that a bench started have ended with it; their command lines name a file below `work`."""
    end = time.monotonic() + seconds
    while ranks := processes_naming(str(work)):
        if time.monotonic() > end:
            found.wrong.append(f"{len(ranks)} ranks still run {seconds:.0f} s later")
            for pid in ranks:
                os.kill(pid, signal.SIGKILL)
            return
        time.sleep(0.2)


def full(usual: Usual, count: int, mount: bool) -> Found:
    """Run on a disk with too little room, at `count` levels from none to almost enough."""
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
    """Run the same command twice on one output, the second begun at a random moment of the first."""
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
