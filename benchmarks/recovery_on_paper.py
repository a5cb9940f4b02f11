"""What recovering every block of a large model would take, on paper; the table of docs/recovering.md.

    .venv/bin/python benchmarks/recovery_on_paper.py

1 M tokens to fit on, 4 M tokens trained on a block, TP 8, 200 TFLOP/s sustained on one accelerator.
"""

from spd_calib.recovery.costs import LLAMAS, on_paper

ROWS = {  # key of the account -> what it is called, and how it is shown
    "dense_bytes": ("dense model, bfloat16, GiB", lambda v: f"{v / 2**30:.0f}"),
    "feed_bytes": ("feed, GiB", lambda v: f"{v / 2**30:.0f}"),
    "student_bytes": ("student and optimizer, GiB", lambda v: f"{v / 2**30:.1f}"),
    "moments_bytes": ("covariances, GiB", lambda v: f"{v / 2**30:.2f}"),
    "closed_form_hours": ("grouping and compensation, GPU hours", lambda v: f"{v:.1f}"),
    "distillation_hours": ("block-to-block distillation, GPU hours", lambda v: f"{v:.1f}"),
    "mean_parameters": ("mean: weights a rank and block", lambda v: f"{v:,.0f}"),
    "rank_8_parameters": ("rank 8: weights a rank and block", lambda v: f"{v:,.0f}"),
    "full_parameters": ("full: weights a rank and block", lambda v: f"{v:,.0f}"),
    "full_share_of_block": ("full, share of what a rank reads of the block", lambda v: f"{100 * v:.1f} %"),
}

if __name__ == "__main__":
    accounts = [on_paper(shape, tp=8, tokens=1_000_000, steps_tokens=4_000_000) for shape in LLAMAS.values()]
    print(f"| | {' | '.join(LLAMAS)} |\n|---|---|---|")
    for key, (name, show) in ROWS.items():
        print(f"| {name} | {' | '.join(show(account[key]) for account in accounts)} |")
