"""A checkpoint is hashed once, and again where it might be another one."""

import os
import threading
import time

import pytest

from spd_calib.runtimes import hashed_once as module
from spd_calib.runtimes.hashed_once import hashed_once


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "JUST_WRITTEN", -3600.0)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    return tmp_path / "model"


class Fingerprint:
    """Counts its calls, each of which takes a while."""

    def __init__(self, value: str = "a"):
        self.calls, self.value = 0, value * 64

    def __call__(self) -> str:
        self.calls += 1
        time.sleep(0.05)
        return self.value


def test_once_for_the_same_files(folder):
    fingerprint = Fingerprint()
    assert {hashed_once(folder, fingerprint) for _ in range(3)} == {"a" * 64}
    assert fingerprint.calls == 1


def test_at_once_by_one(folder):
    fingerprint = Fingerprint()
    threads = [threading.Thread(target=hashed_once, args=(folder, fingerprint)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fingerprint.calls == 1


def test_again_where_a_file_changed_and_kept_size_and_time(folder):
    file, first, second = folder / "model.safetensors", Fingerprint(), Fingerprint("b")
    before = file.stat()
    hashed_once(folder, first)
    file.write_bytes(b"weightz")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert hashed_once(folder, second) == "b" * 64


def test_again_where_a_file_was_just_written(folder, monkeypatch):
    monkeypatch.setattr(module, "JUST_WRITTEN", 3600.0)
    fingerprint = Fingerprint()
    hashed_once(folder, fingerprint)
    hashed_once(folder, fingerprint)
    assert fingerprint.calls == 2


def test_where_nothing_can_be_written(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    fingerprint = Fingerprint()
    assert hashed_once(folder, fingerprint) == "a" * 64 and fingerprint.calls == 1


def test_a_note_that_is_cut_off_is_not_believed(folder, tmp_path):
    fingerprint = Fingerprint()
    hashed_once(folder, fingerprint)
    (note,) = (p for p in (tmp_path / "cache" / "spd-calib" / "fingerprints").iterdir() if not p.suffix)
    note.write_text("aaa")
    assert hashed_once(folder, fingerprint) == "a" * 64 and fingerprint.calls == 2
