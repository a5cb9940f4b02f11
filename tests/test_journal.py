"""Killed runs go on where they stopped and give the same bits; journals of other runs are refused."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

from spd_calib.errors import InputError
from spd_calib.formats.drops import Strategy
from spd_calib.formats.files import read
from spd_calib.formats.profile import Profile
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.sensitivity.fisher import predict
from spd_calib.sensitivity.journal import MeasurementJournal
from spd_calib.sensitivity.measure import Subject
from spd_calib.sensitivity.profile import experiments, profile

KINDS = ["attention", "mlp"]
STRATEGIES = [Strategy.BLOCK_DROP, Strategy.PLAIN_DROP]
RUN = {"model": {"weights": "abc"}, "text": "123"}


@pytest.fixture(scope="module")
def lm():
    return TensorParallelLM.simulated(tiny.build("llama"), 2)


SEQUENCES = [tiny.tokens(1, n, seed=n)[0].tolist() for n in (12, 9, 16, 7, 12)]


def tasks():
    tasks.calls += 1
    return {"task": 1 / 3}


def single(lm, journal):
    tasks.calls = 0
    rows = list(experiments("single", STRATEGIES, num_blocks=lm.num_blocks, sync_points=KINDS))
    return profile(Subject(lm), SEQUENCES, rows=rows, batch_size=2, task_accuracy=tasks, journal=journal)


def cumulative(lm, journal):
    rows = list(experiments("cumulative", STRATEGIES, num_blocks=lm.num_blocks))
    return profile(Subject(lm), SEQUENCES, rows=rows, batch_size=2, journal=journal)


def predicted(lm, journal):  # by more than one pass
    return predict(lm, SEQUENCES, sync_points=KINDS, target_stderr=0.15, batch_size=2, journal=journal)


@pytest.mark.parametrize("method", [single, cumulative, predicted])
def test_cut_off_anywhere_the_run_goes_on_to_the_same_bits(lm, method, tmp_path):
    expected = method(lm, None)
    path = tmp_path / "p.json.journal"
    journal = MeasurementJournal(path, RUN)
    assert method(lm, journal) == expected
    journal.close()
    whole = path.read_bytes()
    dice = random.Random(0)
    cuts = [0, len(whole.splitlines(keepends=True)[0]) - 3, len(whole) - 1, len(whole)]
    for cut in [*cuts, *(dice.randrange(len(whole)) for _ in range(4))]:
        path.write_bytes(whole[:cut])
        journal = MeasurementJournal(path, RUN)
        assert journal.finished == max(whole[:cut].count(b"\n") - 1, 0)
        assert method(lm, journal) == expected
        assert path.read_bytes() == whole
        assert journal.finished == max(whole[:cut].count(b"\n") - 1, 0)
        journal.close()


def test_what_is_finished_is_not_run_again(lm, tmp_path, monkeypatch):
    path = tmp_path / "p.json.journal"
    journal = MeasurementJournal(path, RUN)
    expected = single(lm, journal)
    journal.close()
    lines = path.read_bytes().splitlines(keepends=True)
    in_first_batch = [line for line in lines[1:] if json.loads(line)["key"][0] == 0]
    path.write_bytes(b"".join([lines[0], *in_first_batch]))
    recorded, real = [], lm.record
    monkeypatch.setattr(lm, "record", lambda ids: recorded.append(len(ids)) or real(ids))
    journal = MeasurementJournal(path, RUN)
    assert single(lm, journal) == expected
    assert recorded == [2, 1], "the first batch is not even recorded"
    journal.close()
    recorded.clear()
    assert single(lm, MeasurementJournal(path, RUN)) == expected
    assert recorded == [] and tasks.calls == 0


@pytest.mark.parametrize(
    ("other", "named"), [({**RUN, "text": "9"}, "text"), ({**RUN, "model": {"weights": "x"}}, "model"), ({}, "model")]
)
def test_a_journal_of_another_run_is_refused_and_left_alone(other, named, tmp_path):
    path = tmp_path / "p.json.journal"
    journal = MeasurementJournal(path, other)
    journal.once((0, 1), lambda: {"x": 1.0})
    journal.close()
    before = path.read_bytes()
    with pytest.raises(InputError, match=f"whose {named} differs; delete it"):
        MeasurementJournal(path, RUN)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", ["my own notes", "my own notes\nin two lines\n"])
def test_a_file_that_is_no_journal_is_left_alone(content, tmp_path):
    path = tmp_path / "p.json.journal"
    path.write_text(content)
    with pytest.raises(InputError, match="no journal"):
        MeasurementJournal(path, RUN)
    assert path.read_text() == content


def test_a_journal_that_is_being_written_is_refused(tmp_path):
    journal = MeasurementJournal(tmp_path / "p.json.journal", RUN)
    journal.once((0, 1), lambda: {"x": 1.0})
    with pytest.raises(InputError, match="Another process"):
        MeasurementJournal(tmp_path / "p.json.journal", RUN)
    journal.remove()
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_finite_is_not_remembered(tmp_path):
    journal = MeasurementJournal(tmp_path / "p.json.journal", RUN)
    journal.once((0, 1), lambda: {"sums": [[1.0, float("nan")]]})
    assert list(tmp_path.iterdir()) == []


def command(model: Path, text: Path, output: Path, *more: object) -> list[str]:
    options = ["--tp", 2, "--data", text, "--seq-len", 16, "--max-samples", 12, "--verify-samples", 8]
    whole = [sys.executable, "-m", "spd_calib", "profile", model, *options, "--batch-size", 1, *more, "-o", output]
    return [str(word) for word in whole]


def test_a_killed_command_goes_on_and_writes_the_same_file(spd, llama, text, tmp_path):
    output, journal = tmp_path / "p.json", tmp_path / "p.json.journal"
    arguments = command(llama, text, output)[3:]
    assert spd(*arguments).code == 0
    expected = output.read_bytes()
    output.unlink()
    assert not journal.exists()

    # the command itself, in another process, killed when the first measurements are on disk
    running = subprocess.Popen(command(llama, text, output), stderr=subprocess.DEVNULL)
    while running.poll() is None and not (journal.exists() and journal.stat().st_size > 3000):
        time.sleep(0.002)
    running.kill()
    assert running.wait() == -signal.SIGKILL, "it was done before it could be killed"
    assert not output.exists() and journal.exists()

    outcome = spd(*arguments)
    assert outcome.code == 0 and "going on from" in outcome.err
    assert output.read_bytes() == expected and not journal.exists()
    assert read(Profile, output).provenance.command.startswith("spd-calib profile")


def test_real_ranks_agree_on_what_is_finished(llama, text, tmp_path):
    """Two ranks under torchrun go on from a journal that was cut off in the middle."""
    output, journal = tmp_path / "p.json", tmp_path / "p.json.journal"
    script = tmp_path / "kept.py"
    script.write_text(
        "import os, shutil, sys\n"
        "from spd_calib.sensitivity.journal import MeasurementJournal\n"
        "def close(self):\n"
        "    if int(os.environ['RANK']) == 0: shutil.copy(self.path, str(self.path) + '.whole')\n"
        "    real(self)\n"
        "real, MeasurementJournal.close = MeasurementJournal.close, close\n"
        "from spd_calib.cli.main import main\n"
        "main()\n"
    )

    def run() -> subprocess.CompletedProcess:
        launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
        launch += ["--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", str(script)]
        return subprocess.run(
            [sys.executable, *launch, *command(llama, text, output)[3:]], capture_output=True, text=True, timeout=200
        )

    done = run()
    assert done.returncode == 0, done.stderr[-2000:]
    expected = output.read_bytes()
    output.unlink()
    whole = journal.with_name(journal.name + ".whole").read_bytes()
    journal.write_bytes(whole[: len(whole) // 2])
    done = run()
    assert done.returncode == 0 and "going on from" in done.stderr, done.stderr[-2000:]
    assert output.read_bytes() == expected and not journal.exists()


def test_another_command_with_the_same_output_is_refused(spd, llama, text, tmp_path):
    output, journal = tmp_path / "p.json", tmp_path / "p.json.journal"
    journal.write_text(json.dumps({"model": "another"}) + "\n")
    outcome = spd(*command(llama, text, output)[3:])
    assert outcome.code == 2 and "whose model differs" in outcome.err and outcome.err.count("delete it") == 1
    assert journal.exists() and not output.exists()
