"""What recovering every block of a large model would take, on paper; the table of docs/recovering.md.

    .venv/bin/python benchmarks/recovery_on_paper.py

1 M tokens to fit on, 4 M tokens trained on a block, TP 8, 200 TFLOP/s sustained on one accelerator.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from spd_calib.models.predictor import PredictorKind, predictor_shapes

FLOPS_PER_SECOND = 2e14


@dataclass(frozen=True)
class LlamaSizes:
    """Sizes of a Llama."""

    blocks: int
    d: int
    neurons: int
    kv_width: int

    @property
    def block_parameters(self) -> int:
        """Return the number of weights of a block: q, o; k, v; gate, up, down."""
        return 2 * self.d**2 + 2 * self.d * self.kv_width + 3 * self.d * self.neurons


LLAMAS: Mapping[str, LlamaSizes] = {
    "Llama-2-7B": LlamaSizes(32, 4096, 11008, 4096),
    "Llama-2-70B": LlamaSizes(80, 8192, 28672, 1024),
}


def on_paper(sizes: LlamaSizes, *, tp: int, tokens: int, steps_tokens: int) -> dict[str, float]:
    """Return an account of recovering every block: bytes, hours of one accelerator, weights added a rank and block.

    `tokens` to fit on, `steps_tokens` trained on a block. bfloat16 weights and feed; a student that is trained, its
    gradient and AdamW's two moments in float32 (16 bytes a weight). Of what is streamed the dense block is held, the
    treated one as it is, as it is tried, and one that lies on disk as it runs. A forward pass takes 2 FLOPs a weight
    and token, forward and backward 6; neuron costs run the MLP's first layers once a rank, and each step of a
    treatment is one forward. The refit of down_proj holds five float64 matrices of neurons by neurons: second moments
    of the tokens to fit and to choose by, eigenvectors, and two products; making the first takes 2 FLOPs a token and
    entry, the eigenvectors some 10 a neuron and entry, at a twentieth of the rate.
    """
    p, d = sizes.block_parameters, sizes.d
    forward = 2 * p * tokens
    grouping = forward + tp * 2 * 2 * d * sizes.neurons * tokens
    refit = 8 * forward + 2 * sizes.neurons**2 * tokens + 20 * 10 * sizes.neurons**3

    def parameters(kind: PredictorKind, k: int = 0) -> int:
        return sum(map(math.prod, predictor_shapes(kind, k, d_rank=d // tp, d=d).values()))

    return {
        "models_bytes": 2 * 2.0 * p * sizes.blocks,
        "streamed_bytes": 4 * 2.0 * p,
        "feed_bytes": 2.0 * 4 * d * tokens,
        "student_bytes": 16.0 * p,
        "moments_bytes": 5 * 8.0 * sizes.neurons**2,
        "closed_form_hours": sizes.blocks
        * (2 * forward + 2 * d * d * tokens + grouping + refit)
        / FLOPS_PER_SECOND
        / 3600,
        "distillation_hours": sizes.blocks * (6 + 2) * p * steps_tokens / FLOPS_PER_SECOND / 3600,
        "mean_parameters": parameters("mean"),
        "rank_8_parameters": parameters("low_rank", 8),
        "full_parameters": parameters("full"),
        "full_share_of_block": (parameters("full") - d) / (p / tp),
    }


ROWS = {  # key of the account -> what it is called, and how it is shown
    "models_bytes": ("dense and recovered model, bfloat16, GiB", lambda v: f"{v / 2**30:.0f}"),
    "streamed_bytes": ("with `--stream` instead, GiB", lambda v: f"{v / 2**30:.1f}"),
    "feed_bytes": ("feed, GiB", lambda v: f"{v / 2**30:.0f}"),
    "student_bytes": ("block that is trained, and its optimizer, GiB", lambda v: f"{v / 2**30:.1f}"),
    "moments_bytes": ("refit of down_proj, GiB", lambda v: f"{v / 2**30:.1f}"),
    "closed_form_hours": ("without training, GPU hours", lambda v: f"{v:.1f}"),
    "distillation_hours": ("block-to-block distillation, GPU hours", lambda v: f"{v:.1f}"),
    "mean_parameters": ("mean: weights a rank and block", lambda v: f"{v:,.0f}"),
    "rank_8_parameters": ("rank 8: weights a rank and block", lambda v: f"{v:,.0f}"),
    "full_parameters": ("full: weights a rank and block", lambda v: f"{v:,.0f}"),
    "full_share_of_block": ("full, share of what a rank reads of the block", lambda v: f"{100 * v:.1f} %"),
}

if __name__ == "__main__":
    accounts = [on_paper(sizes, tp=8, tokens=1_000_000, steps_tokens=4_000_000) for sizes in LLAMAS.values()]
    print(f"| | {' | '.join(LLAMAS)} |\n|---|---|---|")
    for key, (name, show) in ROWS.items():
        print(f"| {name} | {' | '.join(show(account[key]) for account in accounts)} |")
