"""Measure a mixture of experts with its sync points dropped: python benchmarks/moe.py MODEL FIT.jsonl HELD_OUT.jsonl

For the model of recipes/demo_model/train_moe.py. Predictors are fitted, block by block, on the last documents of FIT,
which were not trained on, and everything is measured on HELD_OUT. Writes results/moe/figures.json: KL, its standard
error, the share of tokens routed as dense, and what experts chosen at random cost the dense model.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from spd_calib.formats.drops import Drops, Point, Strategy
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.recovery import predictor_fit
from spd_calib.recovery.feed import Feed
from spd_calib.recovery.moments import HeadMoments
from spd_calib.recovery.planned_model import PlannedModel
from spd_calib.recovery.predictor_fit import PredictorForm
from spd_calib.recovery.router_fit import fit_router
from spd_calib.sensitivity.measure import Subject, measure

ROOT = Path(__file__).parents[1]
FORMS = {
    "mean": PredictorForm("mean"),
    "rank 2": PredictorForm("low_rank", 2),
    "rank 8": PredictorForm("low_rank", 8),
    "full": PredictorForm("full"),
}


def sequences(tokenizer, path: Path, first: int | None, count: int) -> list[list[int]]:
    texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    return [ids[:128] for ids in tokenizer(texts[first:][:count])["input_ids"]]


def fitted(folder: Path, tp: int, text: list[list[int]], *, router: str, compensate: bool) -> Drops:
    """Return every attention's sync point dropped, its predictors fitted behind those of the blocks before it."""
    model = PlannedModel(AutoModelForCausalLM.from_pretrained(folder).eval(), tp, all_attentions(folder))
    feed = Feed(model, text)
    for block in range(model.lm.num_blocks):
        feed.move_to(block)
        student = model.students[block]
        if compensate:
            (fit,) = predictor_fit.fit(student, HeadMoments.of(student, feed), forms=[FORMS["full"]])
            student = student.with_predictors(fit.predictors)
        if router != "zero":
            student = student.with_router(fit_router(student, feed, forms=[FORMS[router]])[1].predictor)
        model.put(student)
    return model.drops


def all_attentions(folder: Path) -> Drops:
    blocks = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    return Drops.of({Point(i, "attention"): Strategy.BLOCK_DROP for i in range(blocks)})


@torch.no_grad()
def random_experts(folder: Path, text: list[list[int]]) -> dict[str, float]:
    """Return the loss in nats a token as it is, and where every router's choice is drawn at random."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    generator = torch.Generator().manual_seed(0)

    def drawn(router, args, given):
        logits, weights, chosen = given
        return logits, weights, torch.rand(logits.shape, generator=generator).topk(chosen.shape[-1])[1]

    def loss() -> float:
        losses = [
            model(input_ids=(ids := torch.tensor([row])), labels=ids).loss.item() * (len(row) - 1) for row in text
        ]
        return sum(losses) / sum(len(row) - 1 for row in text)

    as_it_is = loss()
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(drawn)
    return {"loss": as_it_is, "loss_random_experts": loss()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("fit", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("--tp", type=int, default=4)
    parser.add_argument("--fit-documents", type=int, default=96)
    parser.add_argument("--documents", type=int, default=24)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    fit = sequences(tokenizer, args.fit, -args.fit_documents, args.fit_documents)
    held = sequences(tokenizer, args.held_out, 0, args.documents)
    attention = all_attentions(args.model)
    last = len(attention) - 1
    mlp = Drops.of({Point(i, "mlp"): Strategy.BLOCK_DROP for i in range(last)})
    plans = {"MLP": mlp}
    plans |= {f"block {p.block} attention": attention.only([p]) for p in attention}
    for compensate in (False, True):
        for router in ("zero", *FORMS):
            drops = fitted(args.model, args.tp, fit, router=router, compensate=compensate)
            name = f"attention, router {router}{', experts with full predictors' if compensate else ''}"
            plans |= {name: drops, f"{name}; and MLP": drops | mlp}
    lm = TensorParallelLM.simulated(AutoModelForCausalLM.from_pretrained(args.model).eval(), args.tp)
    baseline, found = measure(Subject(lm), held, plans=list(plans.values()))
    rows = [
        {"dropped": name, "kl": c.kl, "kl_stderr": c.kl_stderr, "routed_as_dense": c.routed_as_dense,
         "ppl_increase": c.ppl_increase}
        for name, c in zip(plans, found, strict=True)
    ]  # fmt: skip
    document = {
        "command": "python benchmarks/moe.py MODEL tinystories-calibration.jsonl tinystories-eval.jsonl",
        "tp": args.tp,
        "documents": {"fit": len(fit), "held_out": len(held)},
        "ppl": baseline.ppl,
        "random_experts": random_experts(args.model, held),
        "rows": rows,
    }
    out = ROOT / "results" / "moe" / "figures.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    for row in rows:
        print(f"{row['dropped']:70} KL {row['kl']:.4f}  routed {row['routed_as_dense']:.3f}", flush=True)
    print(document["random_experts"])


if __name__ == "__main__":
    main()
