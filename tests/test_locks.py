"""One process at a time: both journals, within one process and across two, and what is left when one ends."""

import os
import subprocess
import sys

import pytest
import torch

from spd_calib.errors import InputError
from spd_calib.formats.locks import open_locked
from spd_calib.recovery.journal import TensorJournal
from spd_calib.sensitivity.journal import MeasurementJournal


def measurements(tmp_path):
    journal = MeasurementJournal(tmp_path / "journal", {"run": 1})
    journal.once((0,), lambda: {"x": 1.0})
    return journal


def tensors(tmp_path):
    journal = TensorJournal(tmp_path / "journal", {"run": 1})
    journal.save("step", {"x": torch.ones(1)}, note={})
    return journal


def test_a_locked_file_is_refused_until_it_is_closed(tmp_path):
    held = open_locked(tmp_path / "file")
    with pytest.raises(InputError, match="file; wait for it"):
        open_locked(tmp_path / "file")
    os.close(held)
    os.close(open_locked(tmp_path / "file"))


@pytest.mark.parametrize("make", [measurements, tensors])
def test_a_journal_belongs_to_one_run_at_a_time(make, tmp_path):
    with make(tmp_path), pytest.raises(InputError, match="journal; wait for it"):
        make(tmp_path)
    make(tmp_path).remove()  # closed, it can be gone on from
    assert not (tmp_path / "journal").exists()


@pytest.mark.parametrize("make", ["measurements", "tensors"])
def test_the_end_of_a_process_lets_go_of_its_journal(make, tmp_path):
    script = (
        f"import pathlib, sys\nsys.path.insert(0, {os.path.dirname(__file__)!r})\nimport test_locks\n"
        f"journal = test_locks.{make}(pathlib.Path({str(tmp_path)!r}))\nprint('held', flush=True)\nsys.stdin.read()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="Another process"):
            globals()[make](tmp_path)
    finally:
        process.kill()
        process.communicate()
    globals()[make](tmp_path).remove()


def test_a_tensor_journal_gives_back_what_it_was_given(tmp_path):
    with tensors(tmp_path) as journal:
        assert journal.load("other") is None
        found, note = journal.load("step")
        assert torch.equal(found["x"], torch.ones(1)) and note == {}
    (tmp_path / "journal" / "step.safetensors").write_bytes(b"cut off")
    with TensorJournal(tmp_path / "journal", {"run": 1}) as journal, pytest.raises(InputError, match="not whole"):
        journal.load("step")
    with pytest.raises(InputError, match="another recovery"):
        TensorJournal(tmp_path / "journal", {"run": 2})
