"""Checking the form of a model on a small one of the same configuration, before the real weights are read."""

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from .model import TensorParallelLM

RANKS = 2
MAX_POSITIONS = 2**17  # where they are learned there is a row of weights for each


def check_small_copy(config: Any) -> None:
    """Check a narrow model with random weights, in float32 on the CPU, as TensorParallelLM checks a whole model.

    `config` is transformers' configuration of the real model. The narrow one has the same classes, options, head size
    and number of blocks, but few heads, neurons and tokens. That the real weights, split over ranks, give what the
    dense model gives is not checked by this. Raises InputError as TensorParallelLM does; the random state stays as
    it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(_narrow(config), dtype=torch.float32, trust_remote_code=False).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # transformers leaves biases at zero, where a wrong one would not show
                parameter.add_(0.05 * torch.randn(parameter.shape))
    TensorParallelLM.simulated(model, RANKS)


def _narrow(config: Any) -> Any:
    """Return a copy of `config` with RANKS query heads and few neurons.

    The query heads share one KV head where those of the real model share any, else each has its own.
    """
    narrow = copy.deepcopy(config)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    width = RANKS * head_dim
    for name, value in {
        "num_attention_heads": RANKS,
        "num_key_value_heads": RANKS if kv_heads == heads else 1,
        "hidden_size": width,
        "word_embed_proj_dim": width,
        "intermediate_size": width,
        "ffn_dim": width,
        "vocab_size": 64,
        "pad_token_id": 0,
        "max_position_embeddings": min(config.max_position_embeddings, MAX_POSITIONS),
    }.items():
        if hasattr(narrow, name):
            setattr(narrow, name, value)
    return narrow
