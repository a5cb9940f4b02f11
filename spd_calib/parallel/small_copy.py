"""Checking the form of a model on a small one of the same configuration, before the real weights are read."""

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from spd_calib.errors import InputError

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
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            _run(narrowed(config))
    except InputError:
        raise
    except Exception as e:  # values that only a forward stumbles over
        first = (str(e).strip().splitlines() or [type(e).__name__])[0].rstrip(".")
        raise InputError(
            f"The configuration ({config.model_type}) cannot be used: a small model of it does not run ({first}); "
            "correct its config.json, or fetch the model again."
        ) from None


@torch.no_grad()
def _run(config: Any) -> None:
    """Check the model of a narrow configuration, and have it generate two tokens with its cache."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False).eval()
    for parameter in model.parameters():  # transformers leaves biases at zero, where a wrong one would not show
        parameter.add_(0.05 * torch.randn(parameter.shape))
    model.generation_config = GenerationConfig(pad_token_id=0)
    lm = TensorParallelLM.simulated(model, RANKS)
    lm.model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=2, do_sample=False)  # type: ignore[operator]


def narrowed(config: Any) -> Any:
    """Return a copy of `config` with RANKS query heads and few neurons.

    The query heads share one KV head where those of the real model share any, else each has its own.
    """
    narrow, said = copy.deepcopy(config), config.to_dict()  # as an attribute, what differs by block is an error
    heads = config.num_attention_heads
    kv_heads = said.get("num_key_value_heads") or heads
    head_dim = said.get("head_dim") or config.hidden_size // heads
    width = RANKS * head_dim
    key_heads = getattr(config, "linear_num_key_heads", None) or 1
    values_a_key = (getattr(config, "linear_num_value_heads", None) or 1) // key_heads
    for name, value in {
        "num_attention_heads": RANKS,
        "num_key_value_heads": RANKS if kv_heads == heads else 1,
        "linear_num_key_heads": RANKS,
        "linear_num_value_heads": RANKS * values_a_key,
        "hidden_size": width,
        "word_embed_proj_dim": width,
        "intermediate_size": width,
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": width,
        "ffn_dim": width,
        "vocab_size": 64,
        "pad_token_id": 0,
        "max_position_embeddings": min(config.max_position_embeddings, MAX_POSITIONS),
    }.items():
        if name in said:
            setattr(narrow, name, value)
    if of_blocks := said.get("per_layer_config"):
        for own in of_blocks.values():
            if "num_key_value_heads" in own:
                own["num_key_value_heads"] = RANKS if own["num_key_value_heads"] == heads else 1
        narrow.per_layer_config = of_blocks
    return narrow
