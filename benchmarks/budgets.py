"""Do plans keep their promise? Plans for random budgets, each then measured on text that took no part in making it.

    .venv/bin/python benchmarks/budgets.py [--budgets 20]

Two models: the demo's, and ../shared/models/stories260k (left out, saying so, where it is not there). Also, at equal
numbers of drops, KL of the best plan over both kinds of sync points over that of the best over the attention's alone.
Writes results/benchmarks/budgets.json.
"""

import argparse
import json
import os
import random
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from spd_calib.errors import SpdError
from spd_calib.formats.common import Provenance, Strategy, TensorParallel
from spd_calib.formats.plan import Budget
from spd_calib.formats.profile import Point, Profile
from spd_calib.parallel.session import open_session, versions
from spd_calib.planning.budget import cost, describe
from spd_calib.planning.plan import HeldOut, make_plan, measure_sets
from spd_calib.sensitivity import profile as profiling
from spd_calib.sensitivity.text import TextOptions, load_text

ROOT = Path(__file__).resolve().parent.parent
SHARED, DEMO = ROOT.parent / "shared", ROOT / "spd_calib" / "demo"
TP, BATCH = 4, 16
DROP, PLAIN = Strategy.BLOCK_DROP, Strategy.PLAIN_DROP
MODELS = {  # folder, text, tokens a sequence
    "demo": (DEMO / "model", DEMO / "data/calibration.jsonl", 64),
    "stories260k": (SHARED / "models/stories260k", SHARED / "data/tinystories-calibration.jsonl", 128),
}
KINDS = {"max_kl": (0.002, 0.8), "max_ppl_increase": (0.002, 0.8), "max_accuracy_drop": (0.002, 0.2),
         "max_logprob_diff": (0.5, 12.0)}  # log-uniform between these  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", type=int, default=20, help="of each model")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    document: dict = {"command": f"python benchmarks/budgets.py --budgets {args.budgets}", "versions": versions()}
    for name, (folder, text, length) in MODELS.items():
        if not (folder.exists() and text.exists()):
            print(f"{folder} or {text} is not here: left out")
            continue
        document[name] = of_model(folder, text, length, args.budgets)
    (ROOT / "results" / "benchmarks" / "budgets.json").write_text(json.dumps(document, indent=1) + "\n")


def of_model(folder: Path, source: Path, length: int, budgets: int) -> dict:
    session = open_session(str(folder), TP)
    lm = session.load()
    text = load_text(TextOptions(str(source), length, length // 2, 128, 192), session.tokenizer)
    verification, fresh = text.verification[:64], text.verification[64:]
    made = Provenance(command="benchmarks/budgets.py", seed=0, device="cpu", dtype="float32", versions=versions())

    def profile(strategies, kinds) -> Profile:
        baseline, measurements, _ = profiling.profile(
            lm, text.calibration, "single", strategies, BATCH, lambda i, tally: None, sync_points=kinds
        )
        return Profile(
            model=session.ref, tensor_parallel=TensorParallel(size=TP), method="single", rank_by="kl",
            text=text.calibration_ref(), verify_text=text.verification_ref(), baseline=baseline,
            measurements=measurements, provenance=made,
        )  # fmt: skip

    def plan(profile: Profile, budget: Budget):
        held_out = HeldOut([verification], text.verification_ref())
        return make_plan(lm, profile, budget, [text.calibration], held_out, made, BATCH)

    both = profile([DROP, PLAIN], ["attention", "mlp"])
    dice, rows = random.Random(0), []
    for i in range(budgets):
        kind = list(KINDS)[i % len(KINDS)]
        low, high = KINDS[kind]
        budget = Budget(kind=kind, value=low * (high / low) ** dice.random(), strategies=[DROP, PLAIN])
        row = {"budget": describe(budget), "kind": kind, "value": budget.value}
        try:
            planned, choice, _ = plan(both, budget)
        except SpdError as e:
            row |= {"refused": str(e)}
        else:
            drops = {c.point: c.strategy for c in choice.dropped}
            other = measure_sets(lm, [drops], fresh, BATCH, lambda i, tally: None)[0]
            row |= {
                "dropped": len(choice.dropped), "repaired": choice.repaired,
                "verified": (verified := cost(budget, planned.verified)), "verified_kept": verified <= budget.value,
                "fresh": cost(budget, other), "fresh_kept": cost(budget, other) <= budget.value,
            }  # fmt: skip
        rows.append(row)
        print(json.dumps(row), flush=True)
    found = [r for r in rows if "refused" not in r]
    attention, points = profile([DROP], ["attention"]), profile([DROP], ["attention", "mlp"])
    by_drops = []
    for n in range(1, lm.num_blocks + 1):
        kl = [
            _kl_of(plan(p, Budget(kind="drop", value=n, strategies=[DROP]))[1], lm, fresh) for p in (points, attention)
        ]
        by_drops.append({"drops": n, "both_kinds": kl[0], "attention_only": kl[1], "ratio": kl[0] / kl[1]})
        print(json.dumps(by_drops[-1]), flush=True)
    return {
        "tp": TP, "budgets": rows, "plans": len(found), "refused": len(rows) - len(found),
        "verified_within_budget": sum(r["verified_kept"] for r in found),
        "fresh_within_budget": sum(r["fresh_kept"] for r in found),
        "repaired": sum(r["repaired"] > 0 for r in found), "by_drops": by_drops,
    }  # fmt: skip


def _kl_of(choice, lm, sequences) -> float:
    drops: dict[Point, Strategy] = {c.point: c.strategy for c in choice.dropped}
    return measure_sets(lm, [drops], sequences, BATCH, lambda i, tally: None)[0].kl


if __name__ == "__main__":
    main()
