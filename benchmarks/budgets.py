"""Do plans keep their promise? Plans for random budgets, each then measured on text that took no part in making it.

    .venv/bin/python benchmarks/budgets.py [--budgets 20]

Two models: the demo's, and ../shared/models/stories260k (left out, saying so, where it is not there). Also, at equal
numbers of drops, KL of the plan over both kinds of sync points over that of the plan over the attention's alone; for
stories260k beside what no planner can beat, the same ratio of the best of all sets, on ../shared/data/tinystories-eval.
Writes results/benchmarks/budgets.json.
"""

import argparse
import itertools
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
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.parallel.session import Session, open_session, versions
from spd_calib.planning.budget import cost, describe
from spd_calib.planning.plan import HeldOutText, make_plan, measure_sets
from spd_calib.sensitivity import profile as profiling
from spd_calib.sensitivity.text import Text, TextOptions, load_text

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
        if name == "stories260k":
            document[name]["against_all_sets"] = [row for tokens in (64, 128) for row in against_all_sets(tokens)]
    (ROOT / "results" / "benchmarks" / "budgets.json").write_text(json.dumps(document, indent=1) + "\n")


def of_model(folder: Path, source: Path, length: int, budgets: int) -> dict:
    session = open_session(str(folder), TP)
    lm = session.load()
    text = load_text(TextOptions(str(source), length, length // 2, 128, 256), session.tokenizer)
    verification, fresh, more = text.verification[:64], text.verification[64:192], text.verification[192:]

    def further(times: int) -> HeldOutText | None:
        return HeldOutText([more], text.verification_ref()) if times == 1 else None

    def plan(profile: Profile, budget: Budget):
        held_out = HeldOutText([verification], text.verification_ref())
        return make_plan(lm, profile, budget, [text.calibration], held_out, profile.provenance, BATCH, further=further)

    both = profile(session, lm, text, [DROP, PLAIN], ["attention", "mlp"])
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
                "dropped": len(choice.dropped), "repaired": choice.repaired, "seen": planned.verified.seen,
                "verified": (verified := cost(budget, planned.verified)), "verified_kept": verified <= budget.value,
                "fresh": cost(budget, other), "fresh_kept": cost(budget, other) <= budget.value,
            }  # fmt: skip
        rows.append(row)
        print(json.dumps(row), flush=True)
    found = [r for r in rows if "refused" not in r]
    profiles = [profile(session, lm, text, [DROP], kinds) for kinds in (["attention", "mlp"], ["attention"])]
    by_drops = []
    for n in range(1, lm.num_blocks + 1):
        kl = [_kl_of(plan(p, Budget(kind="drop", value=n, strategies=[DROP]))[1], lm, fresh) for p in profiles]
        by_drops.append({"drops": n, "both_kinds": kl[0], "attention_only": kl[1], "ratio": kl[0] / kl[1]})
        print(json.dumps(by_drops[-1]), flush=True)
    return {
        "tp": TP, "budgets": rows, "plans": len(found), "refused": len(rows) - len(found),
        "verified_within_budget": sum(r["verified_kept"] for r in found),
        "fresh_within_budget": sum(r["fresh_kept"] for r in found),
        "verified_on_text_that_chose": sum(r["seen"] for r in found),
        "repaired": sum(r["repaired"] > 0 for r in found), "by_drops": by_drops,
    }  # fmt: skip


def profile(session: Session, lm: TensorParallelLM, text: Text, strategies: list, kinds: list) -> Profile:
    baseline, measurements, _ = profiling.profile(
        lm, text.calibration, "single", strategies, BATCH, lambda i, tally: None, sync_points=kinds
    )
    made = Provenance(command="benchmarks/budgets.py", seed=0, device="cpu", dtype="float32", versions=versions())
    return Profile(
        model=session.ref, tensor_parallel=TensorParallel(size=TP), method="single", rank_by="kl",
        text=text.calibration_ref(), verify_text=text.verification_ref(), baseline=baseline,
        measurements=measurements, provenance=made,
    )  # fmt: skip


def against_all_sets(length: int) -> list[dict]:
    """stories260k, planned on its calibration text; on other text the plans' ratio and that of the best of all sets."""
    folder, source, _ = MODELS["stories260k"]
    session = open_session(str(folder), TP)
    lm = session.load()
    text = load_text(TextOptions(str(source), length, length, 128, 64), session.tokenizer)
    other = load_text(
        TextOptions(str(SHARED / "data/tinystories-eval.jsonl"), length, length, 128, 16), session.tokenizer
    ).calibration
    profiles = [profile(session, lm, text, [DROP], kinds) for kinds in (["attention", "mlp"], ["attention"])]
    points = [Point(block=m.block, sync_point=m.sync_point) for m in profiles[0].measurements]
    rows = []
    for n in (3, 4):
        held_out = HeldOutText([text.verification], text.verification_ref())
        budget = Budget(kind="drop", value=n, strategies=[DROP])
        ours = [
            _kl_of(make_plan(lm, p, budget, [text.calibration], held_out, p.provenance, BATCH)[1], lm, other)
            for p in profiles
        ]
        sets = list(itertools.combinations(points, n))
        measured = measure_sets(lm, [dict.fromkeys(s, DROP) for s in sets], other, BATCH, lambda i, tally: None)
        kl = {s: m.kl for s, m in zip(sets, measured, strict=True)}
        of_attention = min(v for s, v in kl.items() if all(p.sync_point == "attention" for p in s))
        rows.append(
            {"tokens": length, "sequences": len(other), "drops": n, "both_kinds": ours[0], "attention_only": ours[1],
             "ratio": ours[0] / ours[1], "ratio_of_the_best_sets": min(kl.values()) / of_attention}
        )  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    return rows


def _kl_of(choice, lm, sequences) -> float:
    drops: dict[Point, Strategy] = {c.point: c.strategy for c in choice.dropped}
    return measure_sets(lm, [drops], sequences, BATCH, lambda i, tally: None)[0].kl


if __name__ == "__main__":
    main()
