"""How far a Fisher estimate is off on mixtures of experts: python benchmarks/moe_fisher.py MODEL TEXT.jsonl

The choice of experts is not differentiable: a drop that changes it costs what the estimate does not see, but for what
the sync points that are really dropped tell (sensitivity/correction.py). Both are measured on the same documents: each
sync point alone, and random sets of several. Writes results/moe/fisher.json.
"""

import argparse
import json
import random
from pathlib import Path
from statistics import median

from moe import ROOT, sequences
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM, AutoTokenizer

from spd_calib.formats.drops import Drops
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.planning.interactions import Interactions
from spd_calib.sensitivity.fisher import predict
from spd_calib.sensitivity.measure import Subject, measure

SETS = 24


def agreement(predicted: list[float], measured: list[float]) -> dict[str, float]:
    return {
        "median_relative_error": median(abs(p / m - 1) for p, m in zip(predicted, measured, strict=True)),
        "median_ratio": median(p / m for p, m in zip(predicted, measured, strict=True)),
        "spearman": float(spearmanr(predicted, measured).statistic),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tp", type=int, default=4)
    parser.add_argument("--documents", type=int, default=48)
    args = parser.parse_args()
    text = sequences(AutoTokenizer.from_pretrained(args.model), args.text, 0, args.documents)
    lm = TensorParallelLM.simulated(AutoModelForCausalLM.from_pretrained(args.model).eval(), args.tp)
    _, fisher = predict(lm, text, sync_points=["attention", "mlp"], target_stderr=0.1)
    model = Interactions.of_fisher(fisher)
    rng = random.Random(0)
    drawn = [sorted(rng.sample(model.points, rng.randint(2, len(model.points)))) for _ in range(SETS)]
    everything: Drops = model.drops
    plans = [everything.only(points) for points in ([[p] for p in model.points] + drawn)]
    _, found = measure(Subject(lm), text, plans=plans)
    rows = [
        {
            "dropped": [f"{p.block} {p.sync_point}" for p in plan],
            "measured": comparison.kl,
            "measured_stderr": comparison.kl_stderr,
            "predicted": model.kl(plan),
            "routed_as_dense": comparison.routed_as_dense,
        }
        for plan, comparison in zip(plans, found, strict=True)
    ]
    second_order = {m.point: m.second_order for m in fisher.measured}
    measured = {p: row["measured"] for p, row in zip(model.points, rows, strict=False)}
    singles, sets = rows[: len(model.points)], rows[len(model.points) :]
    document = {
        "command": "python benchmarks/moe_fisher.py MODEL tinystories-calibration.jsonl",
        "tp": args.tp,
        "documents": len(text),
        "sampling_error": fisher.sampling_error,
        "single_second_order": agreement([second_order[p] for p in model.points], [measured[p] for p in model.points]),
        "single_corrected": agreement([r["predicted"] for r in singles], [r["measured"] for r in singles]),
        "sets_corrected": agreement([r["predicted"] for r in sets], [r["measured"] for r in sets]),
        "second_order": {f"{p.block} {p.sync_point}": second_order[p] for p in model.points},
        "rows": rows,
    }
    (ROOT / "results" / "moe" / "fisher.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    for name in ("single_second_order", "single_corrected", "sets_corrected"):
        print(name, document[name])


if __name__ == "__main__":
    main()
