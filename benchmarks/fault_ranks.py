"""A rank that dies: one process of a torchrun is killed, and the others must end soon, with one sentence at most."""

import os
import random
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

from fault_kinds import Command, Found, Usual, again, content, look, prepare
from fault_runs import SENTENCE, End

MARK = "SPD_CALIB_FAULTS"
SOON = 30.0  # seconds that the others may take
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
TORCHRUN += ["--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", "-m"]


@dataclass(frozen=True)
class Ranks:
    """A command that runs on two ranks: under torchrun, or starting it itself."""

    command: Command
    itself: bool = False

    def line(self, out: Path) -> list[str]:
        return [*([sys.executable, "-m"] if self.itself else TORCHRUN), "spd_calib", *self.command.line(out)]


class Running:
    """Its processes are known by a mark in their environment, which all that they start inherits."""

    def __init__(self, ranks: Ranks, out: Path, log: Path):
        self.mark, self.log, self.start = uuid.uuid4().hex, log, time.monotonic()
        environment = {**os.environ, MARK: self.mark, "OMP_NUM_THREADS": "1"}
        with open(log, "w") as err:
            self.process = subprocess.Popen(
                ranks.line(out), env=environment, stdout=subprocess.DEVNULL, stderr=err, start_new_session=True
            )

    def processes(self) -> dict[int, str | None]:
        """Return the processes that run: their rank, by process id; None for one that is no rank."""
        found: dict[int, str | None] = {}
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                variables = dict(v.partition("=")[::2] for v in path.read_bytes().decode(errors="replace").split("\0"))
            except OSError:
                continue
            if variables.get(MARK) == self.mark:
                found[int(path.parent.name)] = variables.get("RANK")
        return found

    def process_of(self, victim: str) -> int | None:
        """Return the process of 'rank 0' or 'torchrun', once a rank was started; None where the command ended first."""
        while self.process.poll() is None:
            by_rank = {rank: pid for pid, rank in self.processes().items()}
            if "0" in by_rank and "1" in by_rank:
                return _parent(by_rank["0"]) if victim == "torchrun" else by_rank[victim[-1]]
            time.sleep(0.02)
        return None

    def ended(self, seconds: float) -> bool:
        """Wait for all of them."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None and not self.processes():
                return True
            time.sleep(0.05)
        return False

    def kill(self) -> None:
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def end(self) -> End:
        return End(self.process.wait(), self.log.read_text(errors="replace"), time.monotonic() - self.start, 0)


def _parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def undisturbed(ranks: Ranks, work: Path) -> tuple[Usual, float]:
    """Return how the command ends, what it writes, and the seconds from the first rank's start to the end."""
    out = work / "out"
    prepare(out, ranks.command, None)
    running = Running(ranks, out, work / "first.log")
    running.process_of("rank 0")
    begun = time.monotonic()
    end = running.end()
    assert end.code == 0, end.err
    expected = {n: content(out / n) or {} for n in ranks.command.writes.values()}
    return Usual(ranks.command, work, end, expected), time.monotonic() - begun


def dying(ranks: Ranks, work: Path, victims: list[str], dice: random.Random) -> list[Found]:
    """A try for each of `victims` ('rank 0', 'rank 1', 'torchrun') at random moments; a row for each kind of them."""
    usual, span = undisturbed(ranks, work)
    rows: dict[str, Found] = {}
    for victim in victims:
        found = rows.setdefault(victim, Found(ranks.command.name, f"SIGKILL of {victim}", slowest=0.0))
        _one(ranks, usual, victim, dice.uniform(0, span), found)
    return list(rows.values())


def _one(ranks: Ranks, usual: Usual, victim: str, after: float, found: Found) -> None:
    prepare(usual.out, usual.command, None)
    running = Running(ranks, usual.out, usual.work / "try.log")
    pid = running.process_of(victim)
    time.sleep(after)
    found.tries += 1
    found.moments.append(f"{after:.2f} s after it was started")
    if pid is None or pid not in running.processes():  # it was done before
        running.end()
        return
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    if not running.ended(SOON):
        found.wrong.append(f"{len(running.processes())} processes still run {SOON:.0f} s later")
        running.kill()
    found.slowest = round(max(found.slowest or 0, time.monotonic() - killed), 1)
    end = running.end()
    found.hit += end.code != 0
    found.wrong += _said(ranks, victim, end)
    look(usual, None, found, replace(end, code=-signal.SIGKILL))
    if usual.command.writes:
        again(usual, found, lambda: Running(ranks, usual.out, usual.work / "again.log").end())


def _said(ranks: Ranks, victim: str, end: End) -> list[str]:
    """Return what is wrong with the exit code and the sentences."""
    sentences = [line for line in end.err.splitlines() if line.startswith(SENTENCE)]
    if end.code == 0:
        return [f"exit code 0 after SIGKILL of {victim}"]
    if ranks.itself:
        ok = end.code == 1 and len(sentences) == 1 and "Traceback" not in end.err
    elif victim == "torchrun":
        ok = len(sentences) <= 1
    else:  # torchrun may be quicker than the rank that is left, and reports the signal itself
        ok = len(sentences) <= 1 and (bool(sentences) or "SIGKILL" in end.err)
    return [] if ok else [f"exit code {end.code}, sentences {sentences}: {end.err[-300:]}"]
