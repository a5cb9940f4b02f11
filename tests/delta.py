"""Gated DeltaNet (Qwen3.5's linear attention), the long way, for reference.py: one head, one position at a time.

Like reference.py it shares no code with the package, and calls nothing of the model.
"""

import torch
from torch import Tensor
from transformers import PreTrainedConfig

HYBRIDS = ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")
"""Model types that have it; their norms multiply by one more than their weight, but for its own."""


def is_in(part: dict[str, Tensor]) -> bool:
    """Whether the block has a linear attention."""
    return "linear_attn.out_proj.weight" in part


def attention(part: dict[str, Tensor], config: PreTrainedConfig, rank: int, tp: int, x: Tensor) -> Tensor:
    """The sum over the rank's own heads, those of the values, of head times its columns of `o`."""
    heads, key_heads = config.linear_num_value_heads, config.linear_num_key_heads
    of_key, of_value = config.linear_key_head_dim, config.linear_value_head_dim
    part = _taken_apart(part, config)
    keys = key_heads * of_key
    total = torch.zeros_like(x)
    for head in range(rank * heads // tp, (rank + 1) * heads // tp):
        key_head = head // (heads // key_heads)
        q = _convolved(part, x, key_head * of_key, of_key)
        k = _convolved(part, x, keys + key_head * of_key, of_key)
        v = _convolved(part, x, 2 * keys + head * of_value, of_value)
        q, k = (a / ((a**2).sum(-1, keepdim=True) + 1e-6).sqrt() for a in (q, k))
        written = torch.sigmoid(x @ part["linear_attn.in_proj_b.weight"][head])
        forgets = x @ part["linear_attn.in_proj_a.weight"][head] + part["linear_attn.dt_bias"][head]
        kept = (-part["linear_attn.A_log"][head].exp() * torch.nn.functional.softplus(forgets)).exp()
        state, seen = torch.zeros(of_key, of_value, dtype=x.dtype), []
        for t in range(len(x)):
            state = state * kept[t]
            state = state + written[t] * torch.outer(k[t], v[t] - k[t] @ state)
            seen.append(q[t] @ state / of_key**0.5)
        out = torch.stack(seen)
        out = out / ((out**2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * part["linear_attn.norm.weight"]
        own = slice(head * of_value, (head + 1) * of_value)
        gate = x @ part["linear_attn.in_proj_z.weight"][own].T
        total = total + out * gate * torch.sigmoid(gate) @ part["linear_attn.out_proj.weight"][:, own].T
    return total


def _convolved(part: dict[str, Tensor], x: Tensor, first: int, size: int) -> Tensor:
    """These rows of q, k and v, each a weighted sum of itself and what was there before, through SiLU."""
    own = x @ part["linear_attn.in_proj_qkv.weight"][first : first + size].T
    weights = part["linear_attn.conv1d.weight"][first : first + size, 0]
    width, out = weights.shape[1], torch.zeros_like(own)
    for t in range(len(own)):
        for back in range(min(width, t + 1)):
            out[t] += weights[:, width - 1 - back] * own[t - back]
    return out * torch.sigmoid(out)


def _taken_apart(part: dict[str, Tensor], config: PreTrainedConfig) -> dict[str, Tensor]:
    """The projections as Qwen3.5 has them, where those of one key head lie together (Qwen3-Next)."""
    if "linear_attn.in_proj_qkvz.weight" not in part:
        return part
    key_heads, each = config.linear_num_key_heads, config.linear_num_value_heads // config.linear_num_key_heads
    sizes = [config.linear_key_head_dim] * 2 + [each * config.linear_value_head_dim] * 2
    found: dict[str, list[Tensor]] = {name: [] for name in "qkvzba"}
    for fused, names, widths in (("qkvz", "qkvz", sizes), ("ba", "ba", [each, each])):
        for rows in part[f"linear_attn.in_proj_{fused}.weight"].chunk(key_heads):
            for name, own in zip(names, rows.split(widths), strict=True):
                found[name].append(own)
    whole = {name: torch.cat(rows) for name, rows in found.items()}
    whole["qkv"] = torch.cat([whole["q"], whole["k"], whole["v"]])
    return {**part, **{f"linear_attn.in_proj_{name}.weight": rows for name, rows in whole.items()}}
