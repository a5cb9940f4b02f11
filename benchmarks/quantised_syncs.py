"""Quantised syncs on a language model: every sync alike, which blocks carry the cost, and mixed plans of equal bytes.

    python benchmarks/quantised_syncs.py build/llms/smollm2-135m --tp 3 --data ../shared/data/wikitext2-a.txt \
        --seq-len 96 --choose 2 --verify 8 -o results/llm/quantised_syncs.json

Each sync point alone is measured at 4 bits, at 8 and, behind an attention, dropped, on `--choose` sequences. What 6
bits cost follows. Of these a mixed plan is chosen (spd_calib/planning/sync_bits.py) whose messages have
the bytes of every sync at 4, 6 or 8 bits; all are then measured on `--verify` other sequences. A value that is not
quantised counts 2 bytes, as in bfloat16. The messages are large: on three ranks and more they take two shots.
"""

import argparse
import json
from pathlib import Path

from spd_calib.api.options import RunOptions
from spd_calib.api.provenance import provenance
from spd_calib.formats.drops import BITS, KEPT, SUBLAYERS, Drop, Drops, Point, Strategy
from spd_calib.formats.profile import Comparison
from spd_calib.parallel.quantised_sync import bytes_a_value
from spd_calib.parallel.session import open_session
from spd_calib.planning.sync_bits import FEW, MANY, Option, at_each, within
from spd_calib.sensitivity.measure import Subject, measure
from spd_calib.sensitivity.text import TextOptions, load_text

DROP = Drop(Strategy.BLOCK_DROP)


def bytes_of(treatment: Drop) -> float:
    """Bytes a value of the message."""
    return bytes_a_value(treatment.bits) if treatment.strategy == Strategy.KEEP_SYNC else 0.0


def figures(c: Comparison) -> dict:
    return {name: float(f"{getattr(c, name):.4g}") for name in ("kl", "kl_stderr", "accuracy_drop", "ppl_increase")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--tp", type=int, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--choose", type=int, default=4)
    parser.add_argument("--verify", type=int, default=16)
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()

    session = open_session(given.model, given.tp)
    n = given.seq_len
    text = load_text(TextOptions(str(given.data), n, n, given.choose, given.verify, pack=True), session.tokenizer)
    run = RunOptions(device="cpu").resolved()
    lm = session.load(run.device, str(run.dtype))
    subject = Subject(lm)

    points = [Point(i, sublayer) for i in range(lm.num_blocks) for sublayer in SUBLAYERS]
    attentions = [p for p in points if p.sync_point == "attention"]
    singles = [Drops.of_bits({p: b}) for b in (FEW, MANY) for p in points] + [Drops({p: DROP}) for p in attentions]
    _, measured = measure(subject, text.calibration, plans=singles, batch_size=8)
    alone = dict(zip(singles, (c.kl for c in measured), strict=True))
    at_few, at_many = ({p: alone[Drops.of_bits({p: b})] for p in points} for b in (FEW, MANY))
    dropped = {p: alone[Drops({p: DROP})] for p in attentions}

    def options(point: Point) -> list[Option]:
        found = [(KEPT, 0.0)]
        of_bits = at_each(at_few[point], at_many[point])
        found += [(Drop(Strategy.KEEP_SYNC, bits=b), kl) for b, kl in of_bits.items()]
        found += [(DROP, dropped[point])] if point in dropped else []
        return [Option(treatment, kl, bytes_of(treatment)) for treatment, kl in found]

    def every(bits: int, wanted: list[Point]) -> Drops:
        return Drops.of_bits(dict.fromkeys(wanted, bits))

    plans = {f"every sync, {b} bits": every(b, points) for b in BITS}
    plans |= {f"{name}, 4 bits": every(4, [p for p in points if p.sync_point == name]) for name in SUBLAYERS}
    for b in BITS:
        budget = len(points) * bytes_of(Drop(Strategy.KEEP_SYNC, bits=b))
        mixed = within({p: options(p) for p in points}, budget)
        assert mixed is not None, "as few bytes as one of the options has at every sync"
        plans[f"mixed, the bytes of {b} bits"] = Drops({p: option.treatment for p, option in mixed.items()})
    _, whole = measure(subject, text.verification, plans=list(plans.values()), batch_size=8)

    def row(drops: Drops, c: Comparison) -> dict:
        treated = [drops.at(p) for p in points]
        return {
            **figures(c),
            "bytes_a_value": float(f"{sum(map(bytes_of, treated)) / len(points):.4g}"),
            "dropped": len(drops),
            "syncs_by_bits": {str(b or 16): sum(t.strategy == Strategy.KEEP_SYNC and t.bits == b for t in treated)
                              for b in (None, *BITS)},
        }  # fmt: skip

    found = {
        "model": session.ref.model_dump(mode="json") | {"id": Path(given.model).name},
        "tp": given.tp,
        "text": {"file": given.data.name, "seq_len": n, "choose": given.choose, "verify": given.verify},
        "whole_plans": {name: row(drops, c) for (name, drops), c in zip(plans.items(), whole, strict=True)},
        "alone": [
            {"point": str(p), "kl_at_4_bits": float(f"{at_few[p]:.4g}"), "kl_at_8_bits": float(f"{at_many[p]:.4g}"),
             **({"kl_dropped": float(f"{dropped[p]:.4g}")} if p in dropped else {})}
            for p in points
        ],
        "mixed": {
            name: {str(p): d.bits or str(d.strategy) for p, d in drops.by_point.items()}
            for name, drops in plans.items() if name.startswith("mixed")
        },
        "provenance": provenance(run).model_dump(mode="json"),
    }  # fmt: skip
    given.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name, of_plan in found["whole_plans"].items():
        print(f"{name}: {of_plan}")


if __name__ == "__main__":
    main()
