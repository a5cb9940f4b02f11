"""What each way of recovering leaves of a plan's KL, what it costs, and KL by number of dropped blocks.

    .venv/bin/python benchmarks/recovery.py stories260k [--tp 4] [--methods grouping,mean,...]
    .venv/bin/python benchmarks/recovery.py demo
    .venv/bin/python benchmarks/recovery.py opt      an OPT of 8 blocks, 16 heads, trained here

Every attention sync point is dropped. Each method runs in a process of its own (peak memory), is fitted on one text
and measured on another. Writes results/recovery/MODEL-tpN.json and a figure; a method that stands in the file already
is not run again.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from spd_calib.formats.drops import Drops, Point, Strategy
from spd_calib.models.load import load_dense, load_tokenizer, locate, read_config
from spd_calib.parallel.session import versions
from spd_calib.recovery.distillation import Schedule
from spd_calib.recovery.held_out import HeldOut
from spd_calib.recovery.options import RecoveryMethod, RecoveryOptions
from spd_calib.recovery.planned_model import PlannedModel
from spd_calib.recovery.recover import recover
from spd_calib.sensitivity.text import TextOptions, load_text

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
RESULTS = ROOT / "results" / "recovery"
CACHE = ROOT / "build" / "recovery"
CLOSED: tuple[RecoveryMethod, ...] = ("grouping", "compensation")
METHODS: dict[str, tuple[tuple[RecoveryMethod, ...], int | None]] = {  # what is done, and the predictor's greatest rank
    "grouping": (("grouping",), None),
    "mean": (("compensation",), 0),
    "full predictor": (("compensation",), None),
    "grouping, mean": (CLOSED, 0),
    "grouping, rank 8": (CLOSED, 8),
    "grouping, full predictor": (CLOSED, None),
    "distillation": (("distillation",), None),
    "all": ((*CLOSED, "distillation"), None),
}


def source_of(name: str) -> tuple[Path, Path, Path]:
    """Return model folder, text to fit on and text to measure on. Exits, saying so, where they are not there."""
    demo = ROOT / "spd_calib" / "demo"
    folder, fit, measured = {
        "stories260k": (
            SHARED / "models/stories260k",
            SHARED / "data/tinystories-calibration.jsonl",
            SHARED / "data/tinystories-eval.jsonl",
        ),
        "demo": (demo / "model", demo / "data/calibration.jsonl", demo / "data/heldout.jsonl"),
        "opt": (CACHE / "opt", demo / "data/calibration.jsonl", demo / "data/heldout.jsonl"),
    }[name]
    if name == "opt" and not folder.exists():
        train_opt(folder, demo / "model")
    if missing := [str(p) for p in (folder, fit, measured) if not p.exists()]:
        sys.exit(f"{missing[0]} is not here: the figures of {name} cannot be made on this machine")
    return folder, fit, measured


def train_opt(folder: Path, tokenizer_folder: Path, steps: int = 300, batch: int = 16, length: int = 64) -> None:
    """Train a small OPT a little on fresh stories of the demo's world (no story that is shipped)."""
    from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

    sys.path.insert(0, str(ROOT / "recipes" / "demo_model"))
    import world

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=len(tokenizer), hidden_size=128, ffn_dim=512, num_hidden_layers=8, num_attention_heads=16,
        word_embed_proj_dim=128, max_position_embeddings=256, dropout=0.0, attention_dropout=0.0,
        pad_token_id=tokenizer.pad_token_id or 0, bos_token_id=tokenizer.bos_token_id or 0,
        eos_token_id=tokenizer.eos_token_id or 0,
    )  # fmt: skip
    model = OPTForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    held: list[int] = []
    number = 10_000_000  # far from what the demo model saw and ships
    for step in range(steps):
        while len(held) < batch * length:
            held += tokenizer(world.story("train", number).text).input_ids
            number += 1
        ids = torch.tensor(held[: batch * length]).view(batch, length)
        held = held[batch * length :]
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"training the OPT, step {step} of {steps}: loss {loss.item():.3f}", file=sys.stderr, flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def one(args: argparse.Namespace, method: str) -> dict:
    """Run one method in this process."""
    torch.set_num_threads(1)
    folder, fit, measured = source_of(args.model)
    source = locate(str(folder))
    config = read_config(source)
    tokenizer = load_tokenizer(source)
    dense = load_dense(source, config, device="cpu", dtype="float32")
    dropped = range(config.num_hidden_layers) if args.drop is None else args.drop
    drops = Drops.of({Point(b, "attention"): Strategy.BLOCK_DROP for b in dropped})
    model = PlannedModel(dense, args.tp, drops)
    text = load_text(TextOptions(str(fit), args.seq_len, args.seq_len // 4, args.samples, args.judge), tokenizer)
    other = load_text(TextOptions(str(measured), args.seq_len, args.seq_len // 2, args.eval, 1), tokenizer)
    held = HeldOut(model, other.calibration, batch_size=args.batch)
    as_is, began, cpu = held.measure().comparison(), time.monotonic(), time.process_time()
    attempts: list = []
    if method != "as is":
        what, max_rank = METHODS[method]
        report = recover(
            model, fitting=text.calibration, held_out=text.verification,
            tiers=dict.fromkeys(model.students, "extremely sensitive"),
            options=RecoveryOptions(
                methods=what, max_rank=max_rank, exchange=args.exchange, own_inputs=not args.dense_inputs,
                batch_size=args.batch, block_schedule=Schedule(args.steps), whole_schedule=Schedule(args.final_steps),
            ),
            tick=lambda note: print(f"{method}: {note}", file=sys.stderr, flush=True),
        )  # fmt: skip
        attempts = [attempt.model_dump() for attempt in report.attempts]
    seconds, cpu = time.monotonic() - began, time.process_time() - cpu
    now = held.measure().comparison()
    parameters, flops = added_by_predictors(model)
    return {
        "method": method, "kl": now.kl, "kl_stderr": now.kl_stderr, "ratio": now.kl / as_is.kl,
        "accuracy_drop": now.accuracy_drop, "ppl_increase": now.ppl_increase, "tokens": now.tokens,
        "seconds": seconds, "cpu_seconds": cpu,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "added_parameters_a_rank": parameters, "added_flops_per_token_and_rank": flops,
        "dropped": list(dropped), "attempts": attempts,
    }  # fmt: skip


def added_by_predictors(model: PlannedModel) -> tuple[int, int]:
    """Return the parameters (biases included) and FLOPs per token that predictors add to each rank, over all blocks.

    Grouping and distillation add nothing. A full predictor is a second o_proj slice; the bias is one addition a value.
    """
    of_first_ranks = [s.predictors[0] for s in model.students.values() if s.predictors]  # all ranks' have one shape
    tensors = [p for predictor in of_first_ranks for p in predictor.parameters()]
    return sum(p.numel() for p in tensors), sum(2 * p.numel() if p.dim() == 2 else p.numel() for p in tensors)


def spawn(argv: list[str], method: str, drop: list[int] | None = None) -> dict:
    command = [sys.executable, __file__, *argv, "--one", method]
    if drop is not None:
        command += ["--drop", *map(str, drop)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def figure(document: dict, path: Path) -> None:
    """Draw the KL by number of dropped blocks, one line a method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for method in dict.fromkeys(row["method"] for row in document["by_drops"]):
        rows = sorted((r for r in document["by_drops"] if r["method"] == method), key=lambda r: len(r["dropped"]))
        ax.errorbar(
            [len(r["dropped"]) for r in rows], [r["kl"] for r in rows], [r["kl_stderr"] for r in rows],
            marker="o", capsize=2, label=method,
        )  # fmt: skip
    ax.set(xlabel="blocks without their attention sync", ylabel="KL(dense || planned), nats per token", yscale="log")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_title(f"{document['model']}, TP {document['tp']}")
    ax.legend()
    fig.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("stories260k", "demo", "opt"))
    parser.add_argument("--tp", type=int, default=4)
    parser.add_argument("--methods", help="comma-separated, '/' within a name's commas [default: all]")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--samples", type=int, default=600, help="sequences to fit on")
    parser.add_argument("--judge", type=int, default=48, help="sequences of the same text to judge by")
    parser.add_argument("--eval", type=int, default=64, help="sequences of other text to measure on")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--final-steps", type=int, default=250)
    parser.add_argument("--exchange", type=float, default=0.0, help="0: the predictor that explains most")
    parser.add_argument("--dense-inputs", action="store_true", help="fit and train on the dense model's own inputs")
    parser.add_argument("--figure", help="methods to draw by number of dropped blocks, comma-separated")
    parser.add_argument("--one")
    parser.add_argument("--drop", type=int, nargs="*")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args, args.one)))
        return
    source_of(args.model)
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{args.model}-tp{args.tp}.json"
    settings = {k: v for k, v in vars(args).items() if k not in ("one", "drop", "methods", "figure")}
    document = {**settings, "versions": versions(), "rows": [], "by_drops": []}
    if path.exists():
        document = {**document, **json.loads(path.read_text())}
    argv = sys.argv[1:]
    for method in [m.replace("/", ",") for m in args.methods.split(",")] if args.methods else ["as is", *METHODS]:
        if method not in [row["method"] for row in document["rows"]]:
            row = spawn(argv, method)
            if path.exists():  # another run may have added to it meanwhile
                document |= json.loads(path.read_text())
            document["rows"].append(row)
            path.write_text(json.dumps(document, indent=1) + "\n")
    if args.figure:
        blocks = read_config(locate(str(source_of(args.model)[0]))).num_hidden_layers
        alone = [(spawn(argv, "as is", [b])["kl"], b) for b in range(blocks)]
        order = [b for _, b in sorted(alone)]
        for method in args.figure.split(","):
            name = method.replace("/", ",")
            for n in sorted({1, blocks // 4, blocks // 2, 3 * blocks // 4, blocks} - {0}):
                document["by_drops"].append(spawn(argv, name, sorted(order[:n])))
                path.write_text(json.dumps(document, indent=1) + "\n")
        figure(document, path.with_suffix(".png"))
        path.write_text(json.dumps(document, indent=1) + "\n")
    print_table(document)


def print_table(document: dict) -> None:
    print("| method | KL | of as is | CPU s | peak MiB | weights a rank | FLOPs per token and rank |")
    print("|---|---|---|---|---|---|---|")
    for r in document["rows"]:
        print(
            f"| {r['method']} | {r['kl']:.4f} ± {r['kl_stderr']:.4f} | {r['ratio']:.3f} | {r['cpu_seconds']:.0f} | "
            f"{r['peak_mib']:.0f} | {r['added_parameters_a_rank']} | {r['added_flops_per_token_and_rank']} |"
        )


if __name__ == "__main__":
    main()
