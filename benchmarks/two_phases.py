"""How much a plan with a choice for each phase could win over one plan for both: prefill by one, decode by the other.

    .venv/bin/python benchmarks/two_phases.py [MODEL] [--tp 4] [--data FILE] [--out FILE]     default: the demo's model

As served (spd_calib/sensitivity/served.py): the first half of each sequence is read by the prefill's choice, the second
by the decode's with the cache that it left. The choices: no drop, a third, two thirds and all of the attentions' syncs,
cheapest first by their single cost, each with the other syncs as they are, at 8 and at 4 bits. KL(dense || served) is
of the tokens of the second half; the first of them is predicted by the prefill. The time of a request is modelled, for
the model's own sizes: one prefill of `PROMPT` tokens and some decoded ones; without any, it is the time to the first
token. For every KL that a single plan which drops or quantises something reaches, the fastest single plan and the
fastest pair of at most that KL are set side by side; what exceeds it by less than two standard errors of the
difference, sequence by sequence, is taken to be no more. Links by formula: an all-reduce takes a fixed time, and the
bytes at the rate.
"""

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from spd_calib.demo.assets import data_file, model_dir
from spd_calib.formats.drops import Drops, Point, Strategy
from spd_calib.formats.machine import AllReduce, Machine
from spd_calib.formats.phases import PHASES, ByPhase, Phase
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.parallel.session import versions
from spd_calib.planning.latency import LatencyModel, Step
from spd_calib.planning.machine_latency import on_machine
from spd_calib.planning.machine_tables import load, shipped
from spd_calib.planning.model_sizes import ModelSizes
from spd_calib.planning.sync_bits import every_sync
from spd_calib.planning.two_phases import RequestModel
from spd_calib.sensitivity.measure import Subject
from spd_calib.sensitivity.predictions import FIELDS
from spd_calib.sensitivity.served import measure_served

ROOT = Path(__file__).resolve().parent.parent
SHARES = (0, 1, 2, 3)  # thirds of the attentions' syncs
BITS = (None, 8, 4)
PROMPT, NEW = 2048, (0, 16, 128, 1024)  # tokens of a request: read, and decoded behind the first new one
LINKS = {"10 GbE": (50e-6, 1.25e9), "1 GbE": (50e-6, 1.25e8)}  # seconds of any all-reduce, bytes a second: assumed
GPU = {"memory_bytes_per_second": 1.8e12, "flops_per_second": 2.5e14}  # of the machines at these links: assumed


def sequences_of(args: argparse.Namespace) -> Tensor:
    """Return token ids [sequences, tokens] of the text, documents one after the other."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = args.data.read_text(encoding="utf-8")
    if args.data.suffix == ".jsonl":
        text = "\n".join(json.loads(line)["text"] for line in text.splitlines())
    ids = tokenizer(text[: 40 * args.sequences * args.tokens])["input_ids"]
    return torch.tensor(ids[: args.sequences * args.tokens]).view(args.sequences, args.tokens)


def kl_by_sequence(lm: TensorParallelLM, ids: Tensor, plans: Sequence[ByPhase]) -> list[Tensor]:
    """Return KL(dense || served) of each plan, the mean over the tokens of each sequence's second half [sequences]."""
    tallies = measure_served(Subject(lm), ids.tolist(), plans=plans, batch_size=len(ids))
    return [torch.stack(t.sums)[:, FIELDS.index("kl")] / torch.tensor(t.tokens) for t in tallies]


def choices(lm: TensorParallelLM, ids: Tensor) -> dict[str, Drops]:
    """Return the choices by their names; the attentions' syncs are ranked by what each costs alone, in both phases."""
    n = lm.num_blocks
    alone = [ByPhase.of(Drops.of({Point(i, "attention"): Strategy.BLOCK_DROP})) for i in range(n)]
    costs = [float(kl.mean()) for kl in kl_by_sequence(lm, ids, alone)]
    ranked = sorted(range(n), key=costs.__getitem__)
    found = {}
    for share, bits in itertools.product(SHARES, BITS):
        dropped = Drops.of({Point(i, "attention"): Strategy.BLOCK_DROP for i in ranked[: n * share // 3]})
        found[f"{len(dropped)} of {n} dropped, {bits or 16} bits"] = every_sync(bits, n) | dropped
    return found


def machines(tp: int) -> list[Machine]:
    """Return the shipped tables of so many ranks, and the links by formula."""
    found = [m for m in map(load, shipped()) if isinstance(m, Machine) and m.ranks == tp]
    for name, (fixed, rate) in LINKS.items():
        rows = [AllReduce(bytes=b, seconds=fixed + 2 * (tp - 1) / tp * b / rate) for b in (2**k for k in range(8, 31))]
        found.append(Machine(name=name, source="by formula", ranks=tp, all_reduces=rows, **GPU))
    return found


def no_more(kl: Tensor, budget: Tensor) -> bool:
    """Say whether one KL [B] is no more than another, sequence by sequence, but for two standard errors."""
    more = kl - budget
    return float(more.mean()) <= 2 * float(more.std()) / len(more) ** 0.5


def side_by_side(
    kl: Mapping[tuple[str, str], Tensor], drops: Mapping[str, Drops], models: Mapping[Phase, LatencyModel], new: int
) -> list[dict[str, Any]]:
    """Return, for every KL that one plan reaches, the fastest single plan and the fastest pair of at most that KL."""

    request = RequestModel(models, 1 + new)

    def seconds(pair: tuple[str, str]) -> float:
        return request.seconds(ByPhase(*map(drops.__getitem__, pair)))

    rows = []
    for budget in sorted((kl[name, name] for name in drops if drops[name]), key=lambda k: float(k.mean())):
        within = [pair for pair, k in kl.items() if no_more(k, budget)]
        one, two = min((p for p in within if p[0] == p[1]), key=seconds), min(within, key=seconds)
        row = {
            "max_kl": float(budget.mean()),
            "one": one[0],
            "one_kl": float(kl[one].mean()),
            "one_seconds": seconds(one),
            "prefill": two[0],
            "decode": two[1],
            "two_kl": float(kl[two].mean()),
            "two_seconds": seconds(two),
            "saved": 1 - seconds(two) / seconds(one),
        }
        if not rows or row["one"] != rows[-1]["one"]:
            rows.append(row)
    return rows


@torch.no_grad()
def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(model_dir()))
    parser.add_argument("--tp", type=int, default=4)
    parser.add_argument("--data", type=Path, default=data_file("heldout"))
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "latency" / "two_phases.json")
    args = parser.parse_args(given)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    sizes, ids = ModelSizes.of(model), sequences_of(args)
    lm = TensorParallelLM.simulated(model, args.tp)
    drops = choices(lm, ids)
    pairs = list(itertools.product(drops, drops))
    found = kl_by_sequence(lm, ids, [ByPhase(*map(drops.__getitem__, pair)) for pair in pairs])
    by_sequence = dict(zip(pairs, found, strict=True))
    rows = []
    for machine in machines(args.tp):
        models = {p: on_machine(machine, sizes, tp=args.tp, step=Step(p, 1, PROMPT, 2)) for p in PHASES}
        for new in NEW:
            found_here = side_by_side(by_sequence, drops, models, new)
            rows += [{"machine": machine.name, "new_tokens": new} | row for row in found_here]
            best = max(found_here, key=lambda row: row["saved"])
            print(
                f"{machine.name}, {new} new tokens: two choices save at most {100 * best['saved']:.1f} % of a request"
            )
    document = {
        "model": Path(args.model).name, "tp": args.tp, "blocks": sizes.blocks, "sequences": args.sequences,
        "tokens": args.tokens, "prompt": PROMPT, "links": LINKS, "versions": versions(),
        "kl": [{"prefill": p, "decode": d, "kl": float(v.mean()), "stderr": float(v.std() / len(v) ** 0.5)}
               for (p, d), v in by_sequence.items()],
        "requests": rows,
    }  # fmt: skip
    args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
