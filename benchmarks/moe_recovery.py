"""Recover a mixture of experts: python benchmarks/moe_recovery.py MODEL FIT.jsonl HELD_OUT.jsonl

For the model of recipes/demo_model/train_moe.py, which knows two kinds of text: the demo's world and TinyStories. It is
fitted on documents of both in turn, those of FIT its last, which were not trained on; judged on further ones; measured
on the first documents of HELD_OUT, and on the demo's tasks. Dropped are the sync points of all MLPs but the last, of
all attentions, and of both: as it is, treated in closed form (but for MLPs alone), and distilled after that. With all
attentions dropped also with routers that read a predictor of one form each, in place of the one that the closed form
chose, and distilled without the routers' term of the error. Writes results/moe/recovery.json, row by row,
and prints the table of docs/moe.md.
"""

import argparse
import json
import time
from pathlib import Path

from moe import FORMS, ROOT, all_attentions, sequences
from transformers import AutoModelForCausalLM, AutoTokenizer

from spd_calib.api.tasks import TaskOptions
from spd_calib.formats.drops import Drops, Point, Strategy
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.recovery import routing_error
from spd_calib.recovery.distillation import Schedule
from spd_calib.recovery.feed import Feed
from spd_calib.recovery.held_out import HeldOut
from spd_calib.recovery.options import WITHOUT_TRAINING, RecoveryOptions
from spd_calib.recovery.planned_model import PlannedModel
from spd_calib.recovery.recover import recover
from spd_calib.recovery.router_fit import fit_router

STEPS, BATCH = 60, 8
CALIBRATION, HELD_OUT = (ROOT / "spd_calib" / "demo" / "data" / f"{name}.jsonl" for name in ("calibration", "heldout"))
OUT = ROOT / "results" / "moe" / "recovery.json"
CLOSED_FORM = RecoveryOptions(methods=WITHOUT_TRAINING)
DISTILLED = RecoveryOptions(
    methods=("distillation",),
    block_schedule=Schedule(steps=0),
    whole_schedule=Schedule(steps=STEPS),
    batch_size=BATCH,
)


def in_turn(some: list[list[int]], others: list[list[int]]) -> list[list[int]]:
    return [sequence for pair in zip(some, others, strict=True) for sequence in pair]


def given_routers(model: PlannedModel, form: str, fit: list[list[int]]) -> None:
    """Give every router a predictor of one form, fitted behind the blocks before it, in place of its own."""
    feed = Feed(model, fit)
    for block, student in list(model.students.items()):
        feed.move_to(block)
        found = None if form == "zero" else fit_router(student, feed, forms=[FORMS[form]])[1].predictor
        model.put(student.with_router(found))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("fit", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("--tp", type=int, default=4)
    parser.add_argument("--fit-documents", type=int, default=64, help="of each kind")
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--limit", type=int, default=200, help="documents of each of the demo's tasks")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    fit = in_turn(
        sequences(tokenizer, args.fit, -args.fit_documents, args.fit_documents),
        sequences(tokenizer, CALIBRATION, 0, args.fit_documents),
    )
    held = sequences(tokenizer, args.held_out, 0, args.documents)
    judging = in_turn(
        sequences(tokenizer, args.held_out, args.documents, args.documents // 2),
        sequences(tokenizer, HELD_OUT, 0, args.documents // 2),
    )
    suite = TaskOptions.of("demo", limit=args.limit).load(tokenizer=tokenizer)
    dense = suite.run(TensorParallelLM.simulated(load(args.model), args.tp), tokenizer)
    rows: list[dict] = []

    def add(dropped: str, how: str, router: str, model: PlannedModel, *, tasks: bool = True) -> None:
        c = HeldOut(model, held).measure().comparison()
        figures = ("kl", "kl_stderr", "ppl_increase", "routed_as_dense")
        row = {"dropped": dropped, "recovered": how, "router": router} | {name: getattr(c, name) for name in figures}
        if tasks:
            copy = copy_of(model, args.model, args.tp)
            drops, lm = copy.drops, TensorParallelLM.simulated(copy.restored(), args.tp)
            with lm.running(drops):
                found = suite.compare(dense, suite.run(lm, tokenizer))
            row["tasks"] = [
                {"task": t.task, "dense": t.dense, "planned": t.planned, "difference_stderr": t.difference_stderr}
                for t in found
            ]
        rows.append(row | {"cpu_seconds": time.process_time()})
        print({name: value for name, value in row.items() if name != "tasks"}, row.get("tasks", [""])[-1], flush=True)
        document = {
            "command": "python benchmarks/moe_recovery.py MODEL tinystories-calibration.jsonl tinystories-eval.jsonl",
            "tp": args.tp,
            "documents": {"fit": len(fit), "judging": len(judging), "held_out": len(held), "of each task": args.limit},
            "distillation": {"steps": STEPS, "batch_size": BATCH},
            "rows": rows,
        }
        OUT.parent.mkdir(parents=True, exist_ok=True)
        OUT.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")

    def recovered(model: PlannedModel, options: RecoveryOptions) -> PlannedModel:
        tiers = dict.fromkeys(model.students, "extremely sensitive")
        recover(model, fitting=fit, held_out=judging, tiers=tiers, options=options, tick=print)
        return model

    attention = all_attentions(args.model)
    mlp = Drops.of({Point(i, "mlp"): Strategy.BLOCK_DROP for i in range(len(attention) - 1)})
    model = PlannedModel(load(args.model), args.tp, mlp)
    add("MLP", "as is", "", model)
    add("MLP", "distilled", "", recovered(model, DISTILLED))
    closed: dict[str, PlannedModel] = {}
    for dropped, drops in (("attention", attention), ("both", attention | mlp)):
        model = PlannedModel(load(args.model), args.tp, drops)
        add(dropped, "as is", "zero", model)
        add(dropped, "closed form", "chosen", recovered(model, CLOSED_FORM))
        closed[dropped] = copy_of(model, args.model, args.tp)
        add(dropped, "distilled", "chosen", recovered(model, DISTILLED))
    for form in ("zero", *FORMS):
        model = copy_of(closed["attention"], args.model, args.tp)
        given_routers(model, form, fit)
        add("attention", "closed form", form, model, tasks=False)
        add("attention", "distilled", form, recovered(model, DISTILLED), tasks=False)
    model, routing_error.ROUTING = copy_of(closed["attention"], args.model, args.tp), 0.0
    add("attention", "distilled without the routers' term", "chosen", recovered(model, DISTILLED), tasks=False)
    print(table(rows))


def table(rows: list[dict]) -> str:
    """Return the rows in Markdown; of the tasks the mean over all documents, and its paired error."""
    lines = [
        "| dropped | | router's predictor | KL | perplexity | routed as dense | accuracy, points |",
        "|---" * 7 + "|",
    ]
    for row in rows:
        cells = [row["dropped"], row["recovered"], row["router"], f"{row['kl']:.4f} ± {row['kl_stderr']:.4f}"]
        cells += [f"{row['ppl_increase']:+.2%}".replace("%", " %"), f"{row['routed_as_dense']:.1%}".replace("%", " %")]
        found = ""
        if tasks := row.get("tasks"):
            lost = sum(t["planned"] - t["dense"] for t in tasks) / len(tasks)
            error = sum(t["difference_stderr"] ** 2 for t in tasks) ** 0.5 / len(tasks)
            found = f"{100 * lost:+.1f} ± {100 * error:.1f}"
        lines.append("| " + " | ".join([*cells, found]) + " |")
    return "\n".join(lines)


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def copy_of(model: PlannedModel, folder: Path, tp: int) -> PlannedModel:
    """Return another planned model with the same weights and predictors."""
    other = PlannedModel(load(folder), tp, model.drops)
    for block, student in model.students.items():
        other.put(other.students[block].with_state(student.state()))
    return other


if __name__ == "__main__":
    main()
