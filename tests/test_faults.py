"""`make faults` in short: killed, interrupted, out of disk, two at once, torchrun gone; and that it can fail."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import fault_kinds
import faults

from spd_calib import ranks
from spd_calib.formats import files

NAMES = ("profile", "plan")
MOST = 60  # seconds that a process may take to end


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("faults")
    (place / "out").mkdir()
    faults.inputs(place)
    return place


@pytest.fixture(scope="module")
def usual(work) -> dict[str, fault_kinds.Usual]:
    commands = {c.name: faults.placed(c, work / "in") for c in faults.COMMANDS}
    return {name: faults.usual_of(commands[name], work) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_the_old_file_or_the_new_one(name, usual):
    dice = random.Random(0)
    kinds = [
        fault_kinds.signals(usual[name], signal.SIGKILL, 2, 0, dice),
        fault_kinds.signals(usual[name], signal.SIGINT, 1, 0, dice),
        fault_kinds.full(usual[name], 1, mount=False),
        fault_kinds.two_at_once(usual[name], 1, dice),
    ]
    for found in kinds:
        assert not found.wrong, found
    assert [found.hit for found in kinds[:3]] == [2, 1, 1]


def test_a_profile_killed_while_it_measures_goes_on_to_the_same_bytes(usual):
    found = fault_kinds.while_measuring(usual["profile"], 2, random.Random(0))
    assert not found.wrong and found.hit == 2 and found.resumed >= 1, found


def test_a_writer_that_tears_files_is_found(usual, monkeypatch):
    def torn(path: Path, content: bytes) -> None:
        path.write_bytes(content[: len(content) // 2])
        with open(path, "ab") as f:
            f.write(content[len(content) // 2 :])

    monkeypatch.setattr(files, "write_bytes", torn)
    found = fault_kinds.signals(usual["plan"], signal.SIGKILL, 9, 0, random.Random(0))
    assert any("neither the old nor a whole new one" in wrong for wrong in found.wrong)


@pytest.mark.parametrize("number", files.FULL)
def test_a_full_disk_is_no_fault_of_the_input_whoever_says_so(number):
    for error in (OSError(number, os.strerror(number)), Exception(f"I/O error: {os.strerror(number)} (os error)")):
        assert files.unwritable(Path("x"), error).exit_code == 1
    assert files.unwritable(Path("x"), Exception("Permission denied")).exit_code == 2


RANK = """
import os, time
from spd_calib.parallel.ending import ending_together
with ending_together():
    print(os.getpid(), flush=True)
    time.sleep(600)
"""
TORCHRUN = """
import os, subprocess, sys
variables = {"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}
command = [sys.executable, "-c", sys.argv[1]]
ranks = [subprocess.Popen(command, env={**os.environ, **variables, "RANK": r}) for r in "01"]
print([rank.wait() for rank in ranks], file=sys.stderr)
"""


@pytest.mark.parametrize("victim", ["torchrun", "what started it"])
def test_ranks_end_with_torchrun_even_where_they_have_not_met(victim):
    """A process stands in for torchrun; its ranks have joined no process group."""
    starter = subprocess.Popen(["sleep", "600"])
    variables = {"PYTHONPATH": str(Path(__file__).parent.parent), ranks.STARTED_BY: str(starter.pid)}
    torchrun = subprocess.Popen(
        [sys.executable, "-c", TORCHRUN, RANK],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **variables},
    )  # fmt: skip
    assert torchrun.stdout is not None and torchrun.stdout.readline().strip().isdigit()  # rank 0's; rank 1 is mute
    time.sleep(1)
    (torchrun if victim == "torchrun" else starter).kill()
    if victim != "torchrun":
        starter.wait()
    start = time.monotonic()
    err = torchrun.communicate(timeout=MOST)[1]  # until the last of them has let go of stderr
    assert time.monotonic() - start < MOST / 2
    sentence = "spd-calib: torchrun is gone, and its ranks end; start it again.\n"
    assert err == (sentence if victim == "torchrun" else sentence + "[1, 1]\n")
    starter.kill()
    starter.wait()
