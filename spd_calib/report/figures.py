"""Figures: sensitivity per block with error bars, one colour a strategy."""

import io
from pathlib import Path

from spd_calib.formats.common import Strategy
from spd_calib.formats.files import write_bytes
from spd_calib.formats.plan import Plan
from spd_calib.formats.profile import Profile

# Okabe and Ito's palette: distinguishable with any colour vision, and in grey
COLOURS = {Strategy.KEEP_SYNC: "#0072B2", Strategy.BLOCK_DROP: "#009E73", Strategy.PLAIN_DROP: "#E69F00"}


def sensitivity_figure(profile: Profile, plan: Plan | None, path: Path) -> None:
    """Write a PNG: KL of dropping each block, one bar a strategy measured; the blocks a plan drops are marked below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    blocks = range(profile.model.num_blocks)
    fig, ax = plt.subplots(figsize=(max(6.0, 0.35 * len(blocks) + 2), 4), layout="constrained")
    width = 0.8 / len(profile.strategies)
    for i, strategy in enumerate(profile.strategies):
        kl, rows = profile.sensitivity(strategy, "kl"), profile.of(strategy)
        x = [b + (i - (len(profile.strategies) - 1) / 2) * width for b in blocks]
        ax.bar(
            x,
            [kl[b] for b in blocks],
            width * 0.92,
            yerr=[2 * rows[b].kl_stderr for b in blocks],
            color=COLOURS[strategy],
            error_kw={"linewidth": 1, "capsize": 2},
            label=f"dropped alone: {strategy}" if profile.method == "single" else f"added cost: {strategy}",
        )
    if plan is not None:
        for b in plan.blocks:
            ax.axvspan(b.index - 0.45, b.index + 0.45, ymax=0.02, color=COLOURS[b.strategy])
        used = [s for s in Strategy if s in plan.strategies]
        for strategy in used:
            ax.plot([], [], "s", color=COLOURS[strategy], label=f"plan: {strategy} ({plan.strategies.count(strategy)})")
    ax.set(
        xlabel="block",
        ylabel="KL(dense || dropped), nats a token",
        title=f"{profile.model.id}, TP {profile.tensor_parallel.size}: cost of dropping the attention's sync point",
    )
    ax.set_xticks(range(0, len(blocks), max(1, len(blocks) // 20)))
    ax.legend(frameon=False, fontsize="small")
    ax.spines[["top", "right"]].set_visible(False)
    image = io.BytesIO()
    fig.savefig(image, format="png", dpi=150, metadata={"Software": None})
    plt.close(fig)
    write_bytes(path, image.getvalue())
