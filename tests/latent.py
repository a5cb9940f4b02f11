"""Latent attention (DeepSeek V2 and V3, MiniCPM3), the long way, for reference.py: one head, one position at a time.

Like reference.py it shares no code with the package, and calls nothing of the model.
"""

import math

import torch
from torch import Tensor
from transformers import PreTrainedConfig


def attention(part: dict[str, Tensor], config: PreTrainedConfig, rank: int, tp: int, x: Tensor) -> Tensor:
    """The sum over the rank's own heads of head times its columns of `o`; the bias of `o` is left out."""
    plain, turned, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    heads = config.num_attention_heads
    read, queries = x, "q_proj"
    if config.q_lora_rank is not None:
        read, queries = _normed(part, "q_a_layernorm", _linear(part, "q_a_proj", x)), "q_b_proj"
    both = _linear(part, "kv_a_proj_with_mqa", x)
    latent = _normed(part, "kv_a_layernorm", both[:, : config.kv_lora_rank])
    shared_key = _rotate(both[:, config.kv_lora_rank :], config)  # of all heads
    total = torch.zeros_like(x)
    for head in range(rank * heads // tp, (rank + 1) * heads // tp):
        width = plain + turned
        q = read @ part[f"self_attn.{queries}.weight"][head * width : (head + 1) * width].T
        q = torch.cat([q[:, :plain], _rotate(q[:, plain:], config)], dim=1)
        width = plain + value
        kv = latent @ part["self_attn.kv_b_proj.weight"][head * width : (head + 1) * width].T
        k, v = torch.cat([kv[:, :plain], shared_key], dim=1), kv[:, plain:]
        seen = []
        for t in range(len(x)):
            scores = k[: t + 1] @ q[t] / math.sqrt(plain + turned)
            shares = (scores - scores.max()).exp()
            seen.append((shares / shares.sum()) @ v[: t + 1])
        total = total + torch.stack(seen) @ part["self_attn.o_proj.weight"][:, head * value : (head + 1) * value].T
    return total


def _linear(part: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ part[f"self_attn.{name}.weight"].T + part.get(f"self_attn.{name}.bias", torch.zeros(()))


def _normed(part: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """RMSNorm, with an epsilon of its own."""
    return x / ((x**2).mean(-1, keepdim=True) + 1e-6).sqrt() * part[f"self_attn.{name}.weight"]


def _rotate(x: Tensor, config: PreTrainedConfig) -> Tensor:
    """Rotary positions: entries 2j and 2j + 1, in MiniCPM3 j and j + half, turn by position / theta^(2j/size).

    They may be left in another order than they came in; a product of a query and a key does not depend on it.
    """
    out, size = x.clone(), x.shape[1]
    for j in range(size // 2):
        angle = torch.arange(len(x), dtype=torch.float64) * config.rope_parameters["rope_theta"] ** (-2 * j / size)
        first, second = (j, j + size // 2) if config.model_type == "minicpm3" else (2 * j, 2 * j + 1)
        a, b = x[:, first], x[:, second]
        out[:, first] = a * angle.cos() - b * angle.sin()
        out[:, second] = b * angle.cos() + a * angle.sin()
    return out
