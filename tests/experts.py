"""Mixtures of experts, written out the long way for reference.py: one token, one expert after the other.

Like reference.py it shares no code with the package, and calls nothing of the model.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedConfig

Routed = list[list[tuple[float, int]]]
"""For each token the weights and the indices of the experts that are chosen."""


SIGMOID = ("glm4_moe", "deepseek_v3")
"""Model types whose routers score by a sigmoid, and prefer by the score and a bias of the expert."""


def are_in(part: dict[str, Tensor]) -> bool:
    """Whether the block with these weights is a mixture of experts."""
    return any(".experts." in name for name in part)


def choose(part: dict[str, Tensor], config: PreTrainedConfig, x: Tensor) -> Routed:
    """What the router chooses for each token of x [length, hidden]."""
    return [_choose_for(part, config, token) for token in x]


def _choose_for(part: dict[str, Tensor], config: PreTrainedConfig, token: Tensor) -> list[tuple[float, int]]:
    kind, k = config.model_type, config.num_experts_per_tok
    if kind == "gpt_oss":
        logits = part["mlp.router.weight"] @ token + part["mlp.router.bias"]
        best = _best(logits, range(len(logits)), k)
        total = sum(float(logits[e].exp()) for e in best)
        return [(float(logits[e].exp()) / total, e) for e in best]
    if kind == "granitemoe":
        logits = part["block_sparse_moe.router.weight"] @ token
        best = _best(logits, range(len(logits)), k)
        total = sum(float(logits[e].exp()) for e in best)
        return [(float(logits[e].exp()) / total, e) for e in best]
    logits = part["mlp.gate.weight"] @ token
    scores = torch.sigmoid(logits) if kind in SIGMOID else logits.exp() / logits.exp().sum()
    preferred, allowed = scores, list(range(len(scores)))
    if kind == "ernie4_5_moe":
        preferred = scores + part["mlp.gate.moe_statics.e_score_correction_bias"][0]
    if kind in SIGMOID:
        preferred = scores + part["mlp.gate.e_score_correction_bias"]
    if kind in (*SIGMOID, "deepseek_v2"):  # a group is as good as its best two experts together, or its best one
        size, counted = len(scores) // config.n_group, 1 if kind == "deepseek_v2" else 2
        groups = [range(g * size, (g + 1) * size) for g in range(config.n_group)]
        of_group = torch.stack([sum(preferred[e] for e in _best(preferred, group, counted)) for group in groups])
        allowed = [e for g in _best(of_group, range(config.n_group), config.topk_group) for e in groups[g]]
    best = _best(preferred, allowed, k)
    total = sum(float(scores[e]) for e in best) if _renormalised(config) else 1.0
    times = config.routed_scaling_factor if kind in (*SIGMOID, "deepseek_v2") else 1.0
    return [(times * float(scores[e]) / total, e) for e in best]


def _best(values: Tensor, among: Iterable[int], count: int) -> list[int]:
    return sorted(among, key=lambda e: -float(values[e]))[:count]


def _renormalised(config: PreTrainedConfig) -> bool:
    if config.model_type == "deepseek_v2":
        return False
    return config.model_type in ("mixtral", "ernie4_5_moe", "qwen3_5_moe_text") or config.norm_topk_prob


def partial(part: dict[str, Tensor], config: PreTrainedConfig, rank: int, tp: int, x: Tensor, routed: Routed) -> Tensor:
    """What the rank's neurons of the chosen experts, and of the shared ones, give for x [length, hidden]."""
    if config.model_type == "gpt_oss":
        return _partial_of_gpt_oss(part, config, rank, tp, x, routed)
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


def bias(part: dict[str, Tensor], x: Tensor, routed: Routed) -> Tensor:
    """What the biases of the chosen experts add, whichever rank runs them; zero for experts without."""
    out = torch.zeros_like(x)
    if "mlp.experts.down_proj_bias" in part:
        for t, chosen in enumerate(routed):
            for weight, expert in chosen:
                out[t] += weight * part["mlp.experts.down_proj_bias"][expert]
    return out


def _partial_of_gpt_oss(
    part: dict[str, Tensor], config: PreTrainedConfig, rank: int, tp: int, x: Tensor, routed: Routed
) -> Tensor:
    """The same for experts stored as [in, out], gate and up in turn, with biases: neuron by neuron; no bias of down."""
    out = torch.zeros_like(x)
    size = config.intermediate_size // tp
    for t, chosen in enumerate(routed):
        for weight, expert in chosen:
            gate_up, b = part["mlp.experts.gate_up_proj"][expert], part["mlp.experts.gate_up_proj_bias"][expert]
            for neuron in range(rank * size, (rank + 1) * size):
                gate = min(float(x[t] @ gate_up[:, 2 * neuron] + b[2 * neuron]), config.swiglu_limit)
                up = float(x[t] @ gate_up[:, 2 * neuron + 1] + b[2 * neuron + 1])
                up = max(-config.swiglu_limit, min(up, config.swiglu_limit))
                value = (up + 1) * gate / (1 + math.exp(-config.swiglu_alpha * gate))
                out[t] += weight * value * part["mlp.experts.down_proj"][expert][neuron]
    return out


def _gated(gate: Tensor, up: Tensor, down: Tensor, rank: int, tp: int, token: Tensor) -> Tensor:
    """The rank's neurons of one gated MLP, for one token: silu(gate) * up, and their columns of down."""
    size = len(gate) // tp
    own = slice(rank * size, (rank + 1) * size)
    g = gate[own] @ token
    return down[:, own] @ (g * torch.sigmoid(g) * (up[own] @ token))
