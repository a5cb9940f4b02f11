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
    """Write a PNG: KL of dropping each block, one bar a strategy and kind of sync point; below, what a plan drops."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    blocks = range(profile.model.num_blocks)
    fig, ax = plt.subplots(figsize=(max(6.0, 0.35 * len(blocks) + 2), 4), layout="constrained")
    series = [(s, kind) for kind in profile.sync_points for s in profile.strategies if profile.kl(s, kind)]
    width = 0.8 / len(series)
    what = {"single": "dropped alone", "cumulative": "added cost", "fisher": "predicted"}[profile.method]
    for i, (strategy, kind) in enumerate(series):
        kl = profile.kl(strategy, kind)
        ax.bar(
            [b + (i - (len(series) - 1) / 2) * width for b in kl],
            [value for value, _ in kl.values()],
            width * 0.92,
            yerr=[2 * stderr for _, stderr in kl.values()],
            color=COLOURS[strategy],
            alpha=0.5 if kind == "mlp" else 1,
            hatch="//" if kind == "mlp" else None,
            error_kw={"linewidth": 1, "capsize": 2},
            label=f"{what}: {strategy}{' of the MLP' if kind == 'mlp' else ''}",
        )
    if plan is not None:
        for b in plan.blocks:
            ax.axvspan(b.index - 0.45, b.index + 0.45, ymin=-0.03, ymax=-0.01, color=COLOURS[b.strategy], clip_on=False)
        used = [s for s in Strategy if s in plan.strategies]
        for strategy in used:
            ax.plot([], [], "s", color=COLOURS[strategy], label=f"plan: {strategy} ({plan.strategies.count(strategy)})")
        if plan.mlp_dropped:
            ax.plot(plan.mlp_dropped, [0] * len(plan.mlp_dropped), "kv", ms=4, label="plan: MLP dropped", clip_on=False)
    ax.set(
        xlabel="block",
        ylabel="KL(dense || dropped), nats a token (± 2 s.e.)",
    )
    ax.set_title(
        f"{profile.model.id}, TP {profile.tensor_parallel.size}: cost of dropping a sync point",
        fontsize="medium",
    )
    heights = sorted(
        value for strategy, kind in series for value, _ in profile.kl(strategy, kind).values() if value > 0
    )
    if heights and heights[-1] > 100 * heights[len(heights) // 2]:  # one block would hide all others
        ax.set_yscale("log")
        ax.set_ylim(bottom=max(heights[0], 1e-5) / 2)
    else:
        ax.set_ylim(bottom=0)
    ax.tick_params(axis="x", length=0, pad=8)
    ax.set_xticks(range(0, len(blocks), max(1, len(blocks) // 20)))
    ax.legend(frameon=False, fontsize="small")
    ax.spines[["top", "right"]].set_visible(False)
    image = io.BytesIO()
    fig.savefig(image, format="png", dpi=150, metadata={"Software": None})
    plt.close(fig)
    write_bytes(path, image.getvalue())
