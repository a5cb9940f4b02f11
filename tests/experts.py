"""Mixtures of experts, written out the long way for reference.py: one token, one expert after the other.

Like reference.py it shares no code with the package, and calls nothing of the model.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedConfig

Routed = list[list[tuple[float, int]]]
"""For each token the weights and the indices of the experts that are chosen."""


def are_in(part: dict[str, Tensor]) -> bool:
    """Whether the block with these weights is a mixture of experts."""
    return any(".experts." in name for name in part)


def choose(part: dict[str, Tensor], config: PreTrainedConfig, x: Tensor) -> Routed:
    """What the router chooses for each token of x [length, hidden]."""
    return [_choose_for(part, config, token) for token in x]


def _choose_for(part: dict[str, Tensor], config: PreTrainedConfig, token: Tensor) -> list[tuple[float, int]]:
    kind, k = config.model_type, config.num_experts_per_tok
    if kind == "granitemoe":
        logits = part["block_sparse_moe.router.weight"] @ token
        best = _best(logits, range(len(logits)), k)
        total = sum(float(logits[e].exp()) for e in best)
        return [(float(logits[e].exp()) / total, e) for e in best]
    logits = part["mlp.gate.weight"] @ token
    scores = torch.sigmoid(logits) if kind == "glm4_moe" else logits.exp() / logits.exp().sum()
    preferred, allowed = scores, list(range(len(scores)))
    if kind == "ernie4_5_moe":
        preferred = scores + part["mlp.gate.moe_statics.e_score_correction_bias"][0]
    if kind == "glm4_moe":
        preferred = scores + part["mlp.gate.e_score_correction_bias"]
        size = len(scores) // config.n_group
        groups = [range(g * size, (g + 1) * size) for g in range(config.n_group)]
        of_group = torch.stack([sum(preferred[e] for e in _best(preferred, group, 2)) for group in groups])
        allowed = [e for g in _best(of_group, range(config.n_group), config.topk_group) for e in groups[g]]
    best = _best(preferred, allowed, k)
    total = sum(float(scores[e]) for e in best) if _renormalised(config) else 1.0
    times = config.routed_scaling_factor if kind == "glm4_moe" else 1.0
    return [(times * float(scores[e]) / total, e) for e in best]


def _best(values: Tensor, among: Iterable[int], count: int) -> list[int]:
    return sorted(among, key=lambda e: -float(values[e]))[:count]


def _renormalised(config: PreTrainedConfig) -> bool:
    return config.model_type in ("mixtral", "ernie4_5_moe") or config.norm_topk_prob


def partial(part: dict[str, Tensor], config: PreTrainedConfig, rank: int, tp: int, x: Tensor, routed: Routed) -> Tensor:
    """What the rank's neurons of the chosen experts, and of the shared ones, give for x [length, hidden]."""
    out = torch.zeros_like(x)
    for t, chosen in enumerate(routed):
        for weight, expert in chosen:
            stacked = "block_sparse_moe.experts" if config.model_type == "granitemoe" else "mlp.experts"
            gate_up, down = part[f"{stacked}.gate_up_proj"][expert], part[f"{stacked}.down_proj"][expert]
            out[t] += weight * _gated(gate_up[: len(gate_up) // 2], gate_up[len(gate_up) // 2 :], down, rank, tp, x[t])
    for shared in ("mlp.shared_expert", "mlp.shared_experts"):
        if f"{shared}.up_proj.weight" in part:
            gate, up, down = (part[f"{shared}.{name}_proj.weight"] for name in ("gate", "up", "down"))
            for t, token in enumerate(x):
                own = _gated(gate, up, down, rank, tp, token)
                if "mlp.shared_expert_gate.weight" in part:
                    own = own * torch.sigmoid(part["mlp.shared_expert_gate.weight"][0] @ token)
                out[t] += own
    return out


def _gated(gate: Tensor, up: Tensor, down: Tensor, rank: int, tp: int, token: Tensor) -> Tensor:
    """The rank's neurons of one gated MLP, for one token: silu(gate) * up, and their columns of down."""
    size = len(gate) // tp
    own = slice(rank * size, (rank + 1) * size)
    g = gate[own] @ token
    return down[:, own] @ (g * torch.sigmoid(g) * (up[own] @ token))
