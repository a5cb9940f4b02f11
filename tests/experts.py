"""Mixtures of experts, written out the long way for reference.py: one token, one expert after the other.

Like reference.py it shares no code with the package, and calls nothing of the model.
"""

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
    routed = []
    for token in x:
        logits = part["mlp.gate.weight"] @ token
        probabilities = logits.exp() / logits.exp().sum()
        best = sorted(range(len(logits)), key=lambda e: -float(probabilities[e]))[: config.num_experts_per_tok]
        total = sum(float(probabilities[e]) for e in best) if _renormalised(config) else 1.0
        routed.append([(float(probabilities[e]) / total, e) for e in best])
    return routed


def _renormalised(config: PreTrainedConfig) -> bool:
    return config.model_type == "mixtral" or config.norm_topk_prob


def partial(part: dict[str, Tensor], config: PreTrainedConfig, rank: int, tp: int, x: Tensor, routed: Routed) -> Tensor:
    """What the rank's neurons of the chosen experts, and of the shared ones, give for x [length, hidden]."""
    out = torch.zeros_like(x)
    for t, chosen in enumerate(routed):
        for weight, expert in chosen:
            gate_up, down = part["mlp.experts.gate_up_proj"][expert], part["mlp.experts.down_proj"][expert]
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
