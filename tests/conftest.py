"""What the tests share: tiny models in folders, text for them, and the command line as a function."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import torch

torch.set_num_threads(1)


@dataclass(frozen=True)
class Outcome:
    """How a command ended: exit code, stdout and stderr."""

    code: int
    out: str
    err: str


@pytest.fixture
def spd(monkeypatch, capsys):
    """Run `spd-calib ARGS` in this process."""
    from spd_calib.cli import main

    def run(*args: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["spd-calib", *map(str, args)])
        capsys.readouterr()
        try:
            main.main()
            code = 0
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 0
        out, err = capsys.readouterr()
        return Outcome(code, out, err)

    return run


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    """A folder with a tiny Llama (4 blocks, 8 heads, 2 KV heads, 128 positions) and its tokenizer."""
    return tiny.save(tiny.build("llama"), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """A .jsonl of 40 stories of 32 to 48 words."""
    return tiny.write_jsonl(tmp_path_factory.mktemp("text") / "stories.jsonl", tiny.stories(40))


@pytest.fixture(scope="session")
def profile_file(tmp_path_factory, llama, text) -> Path:
    """A profile of the tiny Llama at TP 4, both strategies."""
    from spd_calib import RunOptions, TextSelection, profile
    from spd_calib.formats.files import dumps

    path = tmp_path_factory.mktemp("profile") / "profile.json"
    selection = TextSelection(seq_len=32, max_samples=12, verify_samples=8)
    path.write_text(dumps(profile(str(llama), tp=4, data=str(text), text=selection, run=RunOptions(device="cpu"))))
    return path
