"""The paper's table on a small real language model: what dropping attention syncs costs, and what is won back.

    .venv/bin/python benchmarks/paper_table.py FOLDER --tp 3 --data ../shared/data/wikitext2-a.txt \\
      --second ../shared/data/tinystories-eval.jsonl --tasks ../shared/tasks/make.py

FOLDER is a transformers checkpoint (of SmolLM2 135M: ../shared/models/real_llms.sh). For each share of the sync points,
those that a profile by Fisher information expects to cost least are dropped (the profile is made once where a share is
not all of them, and kept in results/llm/); each method then treats them, fitted on sequences from all over the first
three quarters of the text. Measured on others from all over its last quarter, on a second text that nothing is fitted
on, and on lm-eval tasks: every loss is the paired difference to the dense model, with its standard error. Row by row
into results/llm/NAME-tpN-table.json; a row that stands there is not made again, and a recovery that was killed goes on.
`--report` only writes NAME-tpN-table.md and .png from it.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from paper_report import MAX_RANK, METHODS, MORE, NAIVE, WITH_HEADS, WITHIN, key_of, report
from recovery_llm import rows_so_far
from transformers import PreTrainedModel

import spd_calib
from spd_calib.api.options import RunOptions
from spd_calib.api.text import TextSelection
from spd_calib.evaluation.harness import Outcome, TaskSuite
from spd_calib.evaluation.options import EvalOptions
from spd_calib.formats.drops import NOTHING_DROPPED, Drops, Point, Strategy
from spd_calib.formats.files import dumps, read, sha256_of, write_text
from spd_calib.formats.plan import Budget
from spd_calib.formats.profile import Comparison, Profile
from spd_calib.models.load import load_dense, load_tokenizer, locate, read_config
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.parallel.session import versions
from spd_calib.planning.candidates import candidates, interactions_of
from spd_calib.planning.model_sizes import ModelSizes
from spd_calib.planning.replication import Affordable, affordable
from spd_calib.recovery.distillation import Schedule
from spd_calib.recovery.held_out import HeldOut
from spd_calib.recovery.journal import TensorJournal
from spd_calib.recovery.options import WITHOUT_TRAINING, RecoveryMethod, RecoveryOptions
from spd_calib.recovery.planned_model import PlannedModel
from spd_calib.recovery.precision import bfloat16_slowdown
from spd_calib.recovery.recover import recover
from spd_calib.sensitivity.norm_estimates import fit_estimates
from spd_calib.sensitivity.text import TextOptions, evenly, load_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results" / "llm"


class Table:
    """Makes the rows: one model, its texts and tasks, and the dense model's answers, computed once."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.source = args, locate(str(args.model))
        self.config, self.tokenizer = read_config(self.source), load_tokenizer(self.source)
        whole = TextOptions(str(args.data), args.seq_len, args.seq_len, 10**6, 1, pack=True)
        found = load_text(whole, self.tokenizer).calibration
        kept_apart = 3 * len(found) // 4  # sequences that follow one another are of the same few documents
        self.sequences = evenly(found[:kept_apart], args.sequences + args.judged)
        self.judging = self.sequences[-args.judged :]
        self.trained = [s for s in evenly(found[:kept_apart], args.trained + args.judged) if s not in self.judging]
        self.measured = evenly(found[kept_apart:], args.measured)
        unseen = [s for s in found[kept_apart:] if s not in self.measured]
        self.budgeted = evenly(unseen, 12 * args.judged)  # to keep a budget on: of documents nothing was fitted to
        second = TextOptions(str(args.second), args.seq_len, args.seq_len, args.measured, 1, pack=True)
        self.second = load_text(second, self.tokenizer).calibration
        lm = TensorParallelLM.simulated(self.load(), args.tp)
        self.estimates = fit_estimates(lm, self.sequences[:32], batch_size=args.batch)  # behind norms: none elsewhere
        began, some = time.process_time(), self.sequences[: args.batch]
        lm(torch.tensor(some))
        self.forward_seconds = (time.process_time() - began) / len(some) * (len(self.sequences) - args.judged)
        self.went_on = False  # whether the present row took over what an interrupted run had made for it
        self.suite: TaskSuite | None = None
        self.dense: Outcome | None = None

    def load(self) -> PreTrainedModel:
        """Return the dense model, in float32."""
        return load_dense(self.source, self.config, device=self.args.device, dtype="float32")

    def cheapest(self, share: float, blocks: int) -> Drops:
        """Return so many of the sync points, those that cost least by the profile, which is made if need be."""
        if share == 1:
            return Drops.of({Point(block, "attention"): Strategy.BLOCK_DROP for block in range(blocks)})
        path = RESULTS / f"{self.args.model.name}-tp{self.args.tp}-profile.json"
        if path.exists():
            profile = read(Profile, path)
        else:
            profile = spd_calib.profile(
                str(self.args.model),
                tp=self.args.tp,
                data=str(self.args.data),
                text=TextSelection(
                    max_samples=32, verify_samples=self.args.measured, seq_len=self.args.seq_len, pack=True
                ),
                method="fisher",
                run=RunOptions(device=self.args.device, dtype="float32", batch_size=self.args.batch),
            )
            write_text(path, dumps(profile))
        budget = Budget(kind="drop", value=profile.model.num_blocks, strategies=["block_drop"])
        return interactions_of(profile, candidates(profile, budget)).front()[round(share * blocks)]

    def row(self, drops: Drops, share: float, method: str) -> dict:
        """Return what is left of the loss when `drops` are treated by the method."""
        args = self.args
        model = PlannedModel(self.load(), args.tp, drops | self.estimates.only([] if method == NAIVE else drops.points))
        began, cpu, attempts = time.monotonic(), time.process_time(), []
        if method in MAX_RANK:
            attempts = self.recover(model, share, method)
        seconds, cpu = time.monotonic() - began, time.process_time() - cpu
        on_text = HeldOut(model, self.measured, batch_size=args.batch).measure().comparison()
        on_second = HeldOut(model, self.second, batch_size=args.batch).measure().comparison()
        added = sum(p.numel() for s in model.students.values() if s.predictors for p in s.predictors[0].parameters())
        left = model.drops
        return {
            "method": method, "share": share, "dropped": len(left), "blocks": left.blocks("attention"),
            "sequences": len(self.sequences) - args.judged,
            "steps": args.steps if "distilled" in method else 0,
            "trained": args.trained if "distilled" in method else 0,
            "text": _figures(on_text), "second": _figures(on_second),
            "replicated": sorted(left.replicated), "replicate": args.replicate, "predictor_weights_a_rank": added,
            "seconds": seconds, "cpu_seconds": cpu, "went_on": self.went_on,  # then seconds are those since alone
            "forwards": cpu / self.forward_seconds,  # of the fitted text through the dense model, as long as that took
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "tasks": self.on_tasks(TensorParallelLM.simulated(model.restored(), args.tp), left),
            "attempts": attempts,
        }  # fmt: skip

    def recover(self, model: PlannedModel, share: float, method: str) -> list:
        """Treat the model's blocks by the method; one that trains takes over what was made without training."""
        args, heads, self.went_on = self.args, None, False
        if method in WITH_HEADS:
            sizes = ModelSizes.of(self.load())
            heads = affordable(sizes, args.replicate, tp=args.tp, most=len(model.students))
        budget = None
        if method == WITHIN:
            budget = Budget(kind="max_ppl_increase", value=0.01, strategies=[Strategy.BLOCK_DROP])
        attempts = self.stage(
            model,
            share,
            method,
            methods=WITHOUT_TRAINING,
            fitting=self.sequences[: -args.judged],
            heads=heads,
            budget=budget,
        )
        if method.startswith("distilled"):
            attempts += self.stage(model, share, method, methods=("distillation",), fitting=self.trained)
        return attempts

    def stage(
        self,
        model: PlannedModel,
        share: float,
        method: str,
        *,
        methods: tuple[RecoveryMethod, ...],
        fitting: Sequence[Sequence[int]],
        heads: Affordable | None = None,
        budget: Budget | None = None,
    ) -> list:
        """Treat the model's blocks without training, or train them, and return what was tried; what is done is kept."""
        args, trains, max_rank = self.args, methods == ("distillation",), MAX_RANK[method]
        schedule = Schedule(steps=args.steps, rate=args.rate, mixed=bfloat16_slowdown(args.device) < 1)
        options = RecoveryOptions(
            methods=methods,
            max_rank=max_rank,
            exchange=0.0,
            batch_size=args.batch,
            block_schedule=Schedule(steps=0),
            whole_schedule=schedule if trains else Schedule(),
        )
        run = {"model": args.model.name, "share": share, "sequences": args.sequences, "max_rank": max_rank}
        name = f"{args.model.name}-tp{args.tp}-{share:.2f}-{max_rank}-{args.sequences}"
        if trains:
            run |= {"method": method, "trained": args.trained, "schedule": repr(schedule)}
            name += f"-{METHODS.index(method)}-{args.trained}"
        free = ROOT / "runs" / "llm" / name
        if method in WITH_HEADS:
            name += f"-replicated-{args.replicate:.2f}"
        if budget:
            name += f"-within-{len(self.budgeted)}"
        place = ROOT / "runs" / "llm" / name
        self.went_on |= place.exists() and (trains or method in ("free at run time", "with predictors"))
        if heads and free.exists() and not place.exists():  # what is done before heads are replicated is the same
            shutil.copytree(free, place)
        with TensorJournal(place, run) as journal:
            report = recover(
                model,
                fitting=fitting,
                held_out=self.budgeted if budget else self.judging,
                tiers=dict.fromkeys(model.students, "extremely sensitive"),
                options=options,
                heads=heads,
                budget=budget,
                journal=journal,
                tick=lambda note: _say(f"{100 * share:.0f} %, {method}: {note}"),
            )
        return [attempt.model_dump() for attempt in report.attempts]

    @torch.no_grad()
    def on_tasks(self, planned: TensorParallelLM, drops: Drops) -> dict:
        """Return the accuracy of each task, dense and planned, and the paired difference with its error."""
        args = self.args
        if args.tasks is None:
            return {}
        with tempfile.TemporaryDirectory() as folder:
            if self.suite is None or self.dense is None:
                subprocess.run([sys.executable, str(args.tasks), folder], check=True)
                names = sorted(path.stem for path in Path(folder).glob("*.yaml"))
                options = EvalOptions(limit=args.limit)
                self.suite = TaskSuite(names, Path(folder), options=options, tokenizer=self.tokenizer)
                lm = TensorParallelLM.simulated(self.load(), args.tp)
                with lm.running(NOTHING_DROPPED):
                    self.dense = self.suite.run(lm, self.tokenizer)
        with planned.running(drops):
            found = self.suite.compare(self.dense, self.suite.run(planned, self.tokenizer))
        return {
            r.task: {
                "dense": r.dense, "planned": r.planned, "difference": r.difference, "stderr": r.difference_stderr,
                "documents": r.documents,
            }
            for r in found
            if r.metric == "acc"
        }  # fmt: skip


def _say(note: str) -> None:
    print(note, file=sys.stderr, flush=True)


def _figures(found: Comparison) -> dict:
    return {
        "kl": found.kl, "kl_stderr": found.kl_stderr, "ppl_increase": found.ppl_increase,
        "ppl_increase_stderr": found.nll_increase_stderr, "accuracy_drop": found.accuracy_drop, "tokens": found.tokens,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tp", type=int, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--second", type=Path, required=True, help="a text of another kind, to measure on")
    parser.add_argument("--tasks", type=Path, help="a script that writes lm-eval tasks into the folder it is given")
    parser.add_argument("--limit", type=int, default=500, help="documents of each task")
    parser.add_argument("--shares", default="0.25,0.5,0.7,0.9,1", help="of the attention syncs, to drop")
    parser.add_argument("--methods", default=";".join(METHODS[1:]), help="separated by semicolons")
    parser.add_argument("--replicate", type=float, default=MORE, help="share of the weights that a rank may read more")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=144, help="to fit on")
    parser.add_argument("--judged", type=int, default=8, help="sequences to judge the whole by")
    parser.add_argument(
        "--measured", type=int, default=64, help="sequences from all over the last quarter, to measure on"
    )
    parser.add_argument("--trained", type=int, default=480, help="sequences to train on")
    parser.add_argument("--steps", type=int, default=320, help="of distillation")
    parser.add_argument("--rate", type=float, default=0.0005, help="of distillation")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--report", action="store_true", help="write the table and the figure, make no rows")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    path = RESULTS / f"{args.model.name}-tp{args.tp}-table.json"
    if not args.report:
        make_rows(args, path)
    texts = f"--data ../shared/data/{args.data.name} --second ../shared/data/{args.second.name}"
    tasks = " --tasks ../shared/tasks/make.py" if args.tasks else ""
    command = f"python benchmarks/paper_table.py build/llms/{args.model.name} --tp {args.tp} {texts}{tasks}"
    if (measured := json.loads(path.read_text(encoding="utf-8"))["measured"]) != parser.get_default("measured"):
        command += f" --measured {measured}"  # the same for all rows of a table
    path.with_suffix(".md").write_text(report(path, command), encoding="utf-8")


def make_rows(args: argparse.Namespace, path: Path) -> None:
    """Add the rows asked for that are not there yet."""
    table = Table(args)
    blocks = table.config.num_hidden_layers
    document = {
        "model": args.model.name, "tp": args.tp, "blocks": blocks, "data": args.data.name,
        "data_sha256": sha256_of(args.data), "second": args.second.name, "seq_len": args.seq_len,
        "measured": args.measured, "versions": versions(), "rows": [],
    }  # fmt: skip
    document["rows"] = rows_so_far(document, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for method in args.methods.split(";"):
        for share in map(float, args.shares.split(",")):
            drops = table.cheapest(share, blocks)
            wanted = {"method": method, "share": share, "sequences": args.sequences, "replicate": args.replicate}
            if key_of(wanted) in map(key_of, document["rows"]):
                continue
            row = table.row(drops, share, method)
            document["rows"] = [*rows_so_far(document, path), row]  # another process may have added to them
            path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
