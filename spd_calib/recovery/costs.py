"""What recovery costs: what a planned model reads and computes more, and what the work itself needs, on paper."""

from collections.abc import Mapping
from dataclasses import dataclass

from .planned import PlannedModel


@dataclass(frozen=True)
class Added:
    """Per rank, over all blocks."""

    parameters: int  # predictors, biases included
    flops: int  # per token


def added(model: PlannedModel) -> Added:
    """What the predictors of `model` add to each rank; grouping and distillation add nothing.

    A full predictor is a second o_proj slice; the bias is one addition a value.
    """
    parameters = flops = 0
    for student in model.students.values():
        for c in (student.compensation or [])[:1]:  # every rank's has the same shapes
            parameters += sum(p.numel() for p in c.parameters())
            flops += sum(2 * p.numel() if p.dim() == 2 else p.numel() for p in c.parameters())
    return Added(parameters, flops)


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes."""

    blocks: int
    d: int
    neurons: int
    kv_width: int

    @property
    def block_parameters(self) -> int:
        """q, o; k, v; gate, up, down."""
        return 2 * self.d**2 + 2 * self.d * self.kv_width + 3 * self.d * self.neurons


LLAMAS: Mapping[str, Shape] = {
    "Llama-2-7B": Shape(32, 4096, 11008, 4096),
    "Llama-2-70B": Shape(80, 8192, 28672, 1024),
}


def on_paper(shape: Shape, tp: int, tokens: int, steps_tokens: int, flops_per_second: float = 2e14) -> dict[str, float]:
    """An account of recovering every block: bytes, seconds of one accelerator, weights added a rank and block.

    `tokens` to fit on, `steps_tokens` trained on a block. bfloat16 dense weights and feed; the student, its gradient
    and AdamW's two moments in float32 (16 bytes a weight). A forward pass takes 2 FLOPs a weight and token, forward
    and backward 6; neuron costs run the MLP's first layers once a rank.
    """
    p, d = shape.block_parameters, shape.d
    forward = 2 * p * tokens
    grouping = forward + tp * 2 * 2 * d * shape.neurons * tokens
    return {
        "dense_bytes": 2.0 * p * shape.blocks,
        "feed_bytes": 2.0 * 4 * d * tokens,
        "student_bytes": 16.0 * p,
        "moments_bytes": 2 * 8.0 * d * d,
        "closed_form_hours": shape.blocks * (2 * forward + 2 * d * d * tokens + grouping) / flops_per_second / 3600,
        "distillation_hours": shape.blocks * (6 + 2) * p * steps_tokens / flops_per_second / 3600,
        "mean_parameters": float(d),
        "rank_8_parameters": 8.0 * (d + d / tp) + d,
        "full_parameters": d * d / tp + d,
        "full_share_of_block": (d * d / tp) / (p / tp),
    }
