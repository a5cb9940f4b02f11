"""What recovery without training leaves of the KL of a real language model, every attention sync point dropped.

    .venv/bin/python benchmarks/recovery_llm.py FOLDER --tp 3 --data ../shared/data/wikitext2-a.txt [--sequences 560]

FOLDER is a transformers checkpoint (of SmolLM2 135M: ../shared/models/real_llms.sh). The last sequences of the text are
measured on, and never fitted on. With `--replicate 7%` heads of other ranks are replicated, so that a rank reads so
many more weights (where it wins most before recovery, on the first sequences to fit on). Writes
results/llm/NAME-tpN.json, row by row: a method that stands there for as many sequences is not run again. `--methods`
and `--blocks` (only the first ones) run a part.
"""

import argparse
import json
import math
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from spd_calib.formats.drops import Drops, Point, Strategy
from spd_calib.formats.files import sha256_of
from spd_calib.models.load import load_dense, load_tokenizer, locate, read_config
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.parallel.session import versions
from spd_calib.planning.budget_options import fraction
from spd_calib.planning.model_sizes import ModelSizes
from spd_calib.planning.replication import affordable, choose_replicated
from spd_calib.recovery.held_out import HeldOut
from spd_calib.recovery.options import REFIT_PARTS, RecoveryMethod, RecoveryOptions, RefitPart
from spd_calib.recovery.planned_model import PlannedModel
from spd_calib.recovery.recover import recover
from spd_calib.sensitivity.measure import Subject, measure
from spd_calib.sensitivity.text import TextOptions, load_text

RESULTS = Path(__file__).resolve().parent.parent / "results" / "llm"
Method = tuple[tuple[RecoveryMethod, ...], int | None, tuple[RefitPart, ...]]
ANY_RANK = 10**6
METHODS: dict[str, Method] = {  # what is done, the predictor's greatest rank, and what is refitted
    "mean": (("compensation",), 0, ()),
    "refit": (("refit",), 0, REFIT_PARTS),
    "mean, refit of down": (("compensation", "refit"), 0, ("down",)),
    "mean, refit of gate, up": (("compensation", "refit"), 0, ("mlp_in",)),
    "mean, refit of gate, up, down": (("compensation", "refit"), 0, ("mlp_in", "down")),
    "mean, refit": (("compensation", "refit"), 0, REFIT_PARTS),
    "grouping, mean, refit": (("grouping", "compensation", "refit"), 0, REFIT_PARTS),
    "predictors": (("compensation",), None, ()),
    "predictors, refit": (("compensation", "refit"), ANY_RANK, REFIT_PARTS),
    "grouping, predictors, refit": (("grouping", "compensation", "refit"), ANY_RANK, REFIT_PARTS),
}


def replicated_heads(args: argparse.Namespace) -> tuple[Drops, float]:
    """Return the blocks whose heads are replicated, and the weights that a rank reads more, as a share."""
    source = locate(str(args.model))
    config, tokenizer = read_config(source), load_tokenizer(source)
    options = TextOptions(str(args.data), args.seq_len, args.seq_len, args.chosen, args.measured, pack=True)
    dense = load_dense(source, config, device=args.device, dtype="float32")
    share, sizes = fraction(args.replicate, "replicate"), ModelSizes.of(dense)
    heads = affordable(sizes, share, tp=args.tp, most=args.blocks - 1)
    lm = TensorParallelLM.simulated(dense, args.tp)
    sequences, subject = load_text(options, tokenizer).calibration, Subject(lm)

    def kl_of(plans: Sequence[Drops]) -> list[float]:
        found = measure(subject, sequences, plans=plans, batch_size=args.batch)[1]
        print(f"replicating: {len(plans)} plans measured", file=sys.stderr, flush=True)
        return [comparison.kl for comparison in found]

    points = [Point(i, "attention") for i in range(args.blocks)]
    chosen = choose_replicated(points, heads, kl_of=kl_of)
    print(f"replicating: {chosen.reasons}", file=sys.stderr, flush=True)
    return chosen.drops, heads.share


def one(args: argparse.Namespace, method: str | None) -> dict:
    """Return the row of a method; of the plan as it is for None."""
    source = locate(str(args.model))
    config, tokenizer = read_config(source), load_tokenizer(source)
    text = load_text(
        TextOptions(str(args.data), args.seq_len, args.seq_len, 10**6, args.measured, pack=True), tokenizer
    )
    sequences, measured = text.calibration[: args.sequences + args.judged], text.verification
    drops = Drops.of(dict.fromkeys((Point(i, "attention") for i in range(args.blocks)), Strategy.BLOCK_DROP))
    drops = drops | args.heads
    model = PlannedModel(load_dense(source, config, device=args.device, dtype="float32"), args.tp, drops)
    began, cpu, attempts = time.monotonic(), time.process_time(), []
    if method is not None:
        what, max_rank, parts = METHODS[method]
        report = recover(
            model,
            fitting=sequences[: -args.judged],
            held_out=sequences[-args.judged :],
            tiers=dict.fromkeys(model.students, "extremely sensitive"),
            options=RecoveryOptions(
                methods=what, refit_parts=parts, max_rank=max_rank, exchange=args.exchange, batch_size=args.batch
            ),
            tick=lambda note: print(f"{method}: {note}", file=sys.stderr, flush=True),
        )
        attempts = [attempt.model_dump() for attempt in report.attempts]
    seconds, cpu = time.monotonic() - began, time.process_time() - cpu
    found = HeldOut(model, measured, batch_size=args.batch).measure().comparison()
    second = None
    if args.second:
        of_second = TextOptions(str(args.second), args.seq_len, args.seq_len, args.measured, 1, pack=True)
        sequences_of_second = load_text(of_second, tokenizer).calibration
        second = HeldOut(model, sequences_of_second, batch_size=args.batch).measure().comparison().kl
    return {
        "method": method or "as is", "sequences": len(sequences) - args.judged, "kl": found.kl,
        "kl_stderr": found.kl_stderr, "kl_second": second, "ppl_increase": found.ppl_increase,
        "accuracy_drop": found.accuracy_drop,
        "replicated": args.heads.replicated, "weights_more": args.weights_more,
        "tokens": found.tokens, "seconds": seconds, "cpu_seconds": cpu,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "predictor_weights_a_rank": sum(
            p.numel() for s in model.students.values() if s.predictors for p in s.predictors[0].parameters()
        ),
        "attempts": attempts,
    }  # fmt: skip


def _heads(row: dict) -> str:
    if not (blocks := row.get("replicated")):
        return "none"
    return f"blocks {', '.join(map(str, blocks))}: {100 * row['weights_more']:.1f} % more weights read"


def rows_so_far(document: dict, path: Path) -> list[dict]:
    """Return the rows that stand in the file already, if it is one of this document; ends the program if it is not."""
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    if differing := [k for k in document if k not in ("rows", "versions") and document[k] != found[k]]:
        sys.exit(f"{path} was made with another `{differing[0]}`; move it away, or name another file")
    return found["rows"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tp", type=int, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--second", type=Path, help="a text of another kind, to measure on as well")
    parser.add_argument("--methods", help="separated by semicolons [default: all]")
    parser.add_argument("--replicate", help="weights that a rank may read more, of others' heads, such as 7%%")
    parser.add_argument("--chosen", type=int, default=4, help="sequences to choose by where heads are replicated")
    parser.add_argument("--blocks", type=int, help="drop and treat the first ones only [all]")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=560, help="to fit on")
    parser.add_argument("--judged", type=int, default=16, help="sequences to judge the whole by")
    parser.add_argument("--measured", type=int, default=32, help="the last sequences, to measure on")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--exchange", type=float, default=0.0, help="0: the predictor that explains most")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="[results/llm/NAME-tpN.json]")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    blocks = read_config(locate(str(args.model))).num_hidden_layers
    args.blocks = args.blocks or blocks
    part = "" if args.blocks == blocks else f"-{args.blocks}-blocks"
    path = args.output or RESULTS / f"{args.model.name}-tp{args.tp}{part}.json"
    document = {
        "model": args.model.name, "tp": args.tp, "dropped": args.blocks, "data": args.data.name,
        "data_sha256": sha256_of(args.data), "second": args.second and args.second.name,
        "seq_len": args.seq_len, "measured": args.measured,
        "exchange": args.exchange, "versions": versions(), "rows": [],
    }  # fmt: skip
    document["rows"] = rows_so_far(document, path)
    args.heads, args.weights_more = replicated_heads(args) if args.replicate else (Drops(), 0.0)
    more = args.replicate or None
    path.parent.mkdir(parents=True, exist_ok=True)
    for method in [None, *(m.strip() for m in (args.methods.split(";") if args.methods else METHODS))]:
        done = [r for r in document["rows"] if (r["method"], r.get("replicate")) == (method or "as is", more)]
        if not any(method is None or r["sequences"] == args.sequences for r in done):
            document["rows"].append(one(args, method) | ({"replicate": more} if more else {}))
            path.write_text(json.dumps(document, indent=1) + "\n")
    print(
        "| method | replicated heads | fitted on, sequences | KL | KL, second text | perplexity | CPU s | predictors' "
        "weights a rank |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for row in document["rows"]:
        print(
            f"| {row['method']} | {_heads(row)} | {row['sequences']} | {row['kl']:.4f} ± {row['kl_stderr']:.4f} | "
            f"{row.get('kl_second') or math.nan:.4f} | "
            f"{100 * row['ppl_increase']:+.1f} % | {row['cpu_seconds']:.0f} | {row['predictor_weights_a_rank']:,} |"
        )


if __name__ == "__main__":
    main()
