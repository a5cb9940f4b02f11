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
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from spd_calib.errors import SpdError
from spd_calib.formats.common import Provenance, TensorParallel
from spd_calib.formats.drops import Drops, Point, Strategy
from spd_calib.formats.plan import Budget
from spd_calib.formats.profile import Profile
from spd_calib.parallel.session import Session, open_session, versions
from spd_calib.planning.budget import cost, describe
from spd_calib.planning.plan import Planned, make_plan
from spd_calib.planning.whole_plans import Calibration, HeldOut, Round, measure_plans, part_of
from spd_calib.sensitivity import profile as profiling
from spd_calib.sensitivity.measure import Subject
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
    subject = Subject(session.load())
    text = load_text(TextOptions(str(source), length, length // 2, 128, 256), session.tokenizer)
    verification, fresh, more = text.verification[:64], text.verification[64:192], text.verification[192:]
    rounds = [Round([part], text.verification_ref()) for part in (verification, more)]
    both = profile(session, subject, text, [DROP, PLAIN], ["attention", "mlp"])
    dice, rows = random.Random(0), []
    for i in range(budgets):
        kind = list(KINDS)[i % len(KINDS)]
        low, high = KINDS[kind]
        budget = Budget(kind=kind, value=low * (high / low) ** dice.random(), strategies=[DROP, PLAIN])
        row = {"budget": describe(budget), "kind": kind, "value": budget.value}
        try:
            planned = plan(subject, both, budget, text, rounds)
        except SpdError as e:
            row |= {"refused": str(e)}
        else:
            choice, found = planned.choice, planned.plan.verified
            other = measure_plans([choice.drops], [fresh], subject=subject, batch_size=BATCH)[0]
            row |= {
                "dropped": len(choice.drops), "given_back": choice.given_back, "reused": found.reused,
                "verified": (verified := cost(budget, found)), "verified_kept": verified <= budget.value,
                "fresh": cost(budget, other), "fresh_kept": cost(budget, other) <= budget.value,
            }  # fmt: skip
        rows.append(row)
        print(json.dumps(row), flush=True)
    found = [r for r in rows if "refused" not in r]
    profiles = [profile(session, subject, text, [DROP], kinds) for kinds in (["attention", "mlp"], ["attention"])]
    by_drops = []
    for n in range(1, subject.lm.num_blocks + 1):
        budget = Budget(kind="drop", value=n, strategies=[DROP])
        kl = [_kl_of(plan(subject, p, budget, text, rounds), subject, fresh) for p in profiles]
        by_drops.append({"drops": n, "both_kinds": kl[0], "attention_only": kl[1], "ratio": kl[0] / kl[1]})
        print(json.dumps(by_drops[-1]), flush=True)
    return {
        "tp": TP, "budgets": rows, "plans": len(found), "refused": len(rows) - len(found),
        "verified_within_budget": sum(r["verified_kept"] for r in found),
        "fresh_within_budget": sum(r["fresh_kept"] for r in found),
        "verified_on_text_that_chose": sum(r["reused"] for r in found),
        "repaired": sum(r["given_back"] > 0 for r in found), "by_drops": by_drops,
    }  # fmt: skip


def plan(subject: Subject, profile: Profile, budget: Budget, text: Text, rounds: list[Round]) -> Planned:
    measure = partial(measure_plans, subject=subject, batch_size=BATCH)
    return make_plan(
        profile,
        budget,
        calibration=Calibration(
            partial(measure, texts=[text.calibration]), race=partial(measure, texts=[part_of(text.calibration)])
        ),
        held_out=HeldOut(rounds, measure=measure),
        module_paths=subject.lm.module_paths,
        provenance=profile.provenance,
    )


def profile(session: Session, subject: Subject, text: Text, strategies: list, kinds: list) -> Profile:
    rows = list(profiling.experiments("single", strategies, num_blocks=subject.lm.num_blocks, sync_points=kinds))
    baseline, measurements, _ = profiling.profile(subject, text.calibration, rows=rows, batch_size=BATCH)
    made = Provenance(command="benchmarks/budgets.py", seed=0, device="cpu", dtype="float32", versions=versions())
    return Profile(
        model=session.ref, tensor_parallel=TensorParallel(size=TP), method="single", rank_by="kl",
        text=text.calibration_ref(), verify_text=text.verification_ref(), baseline=baseline,
        measurements=measurements, provenance=made,
    )  # fmt: skip


def against_all_sets(length: int) -> list[dict]:
    """Plan stories260k on its calibration text; return, on other text, the ratios of the plans and of the best sets."""
    folder, source, _ = MODELS["stories260k"]
    session = open_session(str(folder), TP)
    subject = Subject(session.load())
    text = load_text(TextOptions(str(source), length, length, 128, 64), session.tokenizer)
    other = load_text(
        TextOptions(str(SHARED / "data/tinystories-eval.jsonl"), length, length, 128, 16), session.tokenizer
    ).calibration
    profiles = [profile(session, subject, text, [DROP], kinds) for kinds in (["attention", "mlp"], ["attention"])]
    points = [Point(m.block, m.sync_point) for m in profiles[0].measurements]
    rounds, rows = [Round([text.verification], text.verification_ref())], []
    for n in (3, 4):
        budget = Budget(kind="drop", value=n, strategies=[DROP])
        ours = [_kl_of(plan(subject, p, budget, text, rounds), subject, other) for p in profiles]
        sets = [Drops.of(dict.fromkeys(some, DROP)) for some in itertools.combinations(points, n)]
        measured = measure_plans(sets, [other], subject=subject, batch_size=BATCH)
        kl = {drops: m.kl for drops, m in zip(sets, measured, strict=True)}
        of_attention = min(v for drops, v in kl.items() if not drops.requires_mlp_drop)
        rows.append(
            {"tokens": length, "sequences": len(other), "drops": n, "both_kinds": ours[0], "attention_only": ours[1],
             "ratio": ours[0] / ours[1], "ratio_of_the_best_sets": min(kl.values()) / of_attention}
        )  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    return rows


def _kl_of(planned: Planned, subject: Subject, sequences: list[list[int]]) -> float:
    return measure_plans([planned.choice.drops], [sequences], subject=subject, batch_size=BATCH)[0].kl


if __name__ == "__main__":
    main()
