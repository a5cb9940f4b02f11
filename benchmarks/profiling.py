"""`--method fisher` against measuring every sync point: time, and rank correlation of what they find.

    .venv/bin/python benchmarks/profiling.py [-o results/benchmarks/profiling.json]

Times are CPU seconds of one thread, so that other work on the machine hardly matters; both run the same sequences in
the same batches. The models of 24 and 80 blocks are random, with blocks of unequal weight; models at hand can be added
with --model FOLDER --data FILE.
"""

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pandas
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

from spd_calib.formats.common import Strategy
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.parallel.session import open_session, versions
from spd_calib.sensitivity.fisher import fisher
from spd_calib.sensitivity.profile import profile
from spd_calib.sensitivity.text import TextOptions, load_text

VOCABULARY = 256


def random_llama(blocks: int, width: int) -> PreTrainedModel:
    return enliven(
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=width,
                intermediate_size=3 * width,
                num_hidden_layers=blocks,
                num_attention_heads=8,
                num_key_value_heads=4,
                max_position_embeddings=256,
            )
        )
    )


def random_opt(blocks: int, width: int) -> PreTrainedModel:
    return enliven(
        OPTForCausalLM(
            OPTConfig(
                vocab_size=VOCABULARY,
                hidden_size=width,
                word_embed_proj_dim=width,
                ffn_dim=3 * width,
                num_hidden_layers=blocks,
                num_attention_heads=16,
                max_position_embeddings=256,
                tie_word_embeddings=False,
            )
        )
    )


def enliven(model: PreTrainedModel) -> PreTrainedModel:
    """Weights that matter, and blocks that add to the stream by factors from 0.15 to 1.2."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2:
                p.normal_(std=1 if "embed" in name else 1 / p.shape[1] ** 0.5)
        for layer in model.get_decoder().layers:
            gain = 0.15 * 8 ** torch.rand(1).item()
            for name, p in layer.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight")):
                    p.mul_(gain)
        model.get_output_embeddings().weight.normal_(std=2 / model.config.hidden_size**0.5)
    return model.eval()


def compare(lm: TensorParallelLM, sequences: list[list[int]], kinds: list, target: float, batch: int) -> dict:
    start = time.process_time()
    _, predicted = fisher(lm, sequences, kinds, target, batch)
    middle = time.process_time()
    _, rows = profile(lm, sequences, "single", [Strategy.BLOCK_DROP], batch, lambda i, tally: None, sync_points=kinds)
    end = time.process_time()
    points = {
        (term[0].block, term[0].sync_point): predicted.of(term[0])[0] for term in predicted.terms if len(term) == 1
    }
    pairs = pandas.DataFrame([(points[r.block, r.sync_point], r.kl) for r in rows], columns=["predicted", "measured"])
    return {
        "sync_points": kinds,
        "sequences": len(sequences),
        "tokens": sum(map(len, sequences)),
        "samples": predicted.samples,
        "sampling_error": predicted.sampling_error,
        "fisher_seconds": round(middle - start, 2),
        "exhaustive_seconds": round(end - middle, 2),
        "ratio": round((middle - start) / (end - middle), 3),
        "spearman": round(float(pairs.corr("spearman").iloc[0, 1]), 4),
        "mean_kl": float(pairs["measured"].mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", type=Path, default=Path("results/benchmarks/profiling.json"))
    parser.add_argument("--model", action="append", default=[], help="A folder; with one --data each.")
    parser.add_argument("--data", action="append", default=[])
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--only", choices=["random", "given"], help="Leave out the others.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []

    def row(name: str, tp: int, lm: TensorParallelLM, sequences: list[list[int]], kinds: list, target: float) -> None:
        rows.append({"model": name, "blocks": lm.num_blocks, "tp": tp, **compare(lm, sequences, kinds, target, 16)})
        print(rows[-1], flush=True)

    if options.only != "given":
        tokens = torch.randint(
            0, VOCABULARY, (options.sequences, 32), generator=torch.Generator().manual_seed(1)
        ).tolist()
        for name, model, kinds in (
            ("random Llama, width 128", random_llama(24, 128), ["attention"]),
            ("random Llama, width 64", random_llama(80, 64), ["attention"]),
            ("random OPT, width 64", random_opt(8, 64), ["attention", "mlp"]),
        ):
            row(name, 4, TensorParallelLM.simulated(model, 4), tokens, kinds, 0.1)
    for folder, data in zip(options.model, options.data if options.only != "random" else [], strict=False):
        for tp in (2, 4):
            session = open_session(folder, tp)
            text = load_text(TextOptions(data, 64, 32, 2 * options.sequences, 8), session.tokenizer)
            row("/".join(Path(folder).parts[-2:]), tp, session.load(), text.calibration, ["attention", "mlp"], 0.08)
    options.o.parent.mkdir(parents=True, exist_ok=True)
    options.o.write_text(json.dumps({"versions": versions(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
