"""What profiling costs: against the loop one writes by hand, against the machine's own rate, and killed on the way.

    .venv/bin/python benchmarks/profiling.py [-o results/benchmarks/profiling.json]

by hand: for every candidate and batch one full forward of the simulated model, its logits compared with the dense ones.
Times are CPU seconds of one thread, so that other work on the machine hardly matters; all run the same sequences in
the same batches. The models are random, with blocks of unequal weight (block_drop at each attention's sync point), the
demo's, and ../shared/models/stories260k (left out, saying so, where it is not there). Memory is the growth of the
process's peak, each measured in a process of its own, in which malloc hands back what is freed
(MALLOC_MMAP_THRESHOLD_): else holes of the heap are counted. One run writes the whole file, part by part.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pandas
import torch
from budgets import MODELS
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

from spd_calib.formats.drops import Strategy, Sublayer
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.parallel.session import open_session, versions
from spd_calib.sensitivity.fisher import predict
from spd_calib.sensitivity.measure import Subject, batches
from spd_calib.sensitivity.metrics import Tally
from spd_calib.sensitivity.profile import Experiment, experiments, profile
from spd_calib.sensitivity.text import TextOptions, load_text
from spd_calib.sensitivity.tiers import tiers

VOCABULARY = 256
ATTENTION: list[Sublayer] = ["attention"]
BOTH: list[Sublayer] = ["attention", "mlp"]
BATCH = 16


def random_llama(blocks: int, width: int, vocabulary: int = VOCABULARY) -> PreTrainedModel:
    return enliven(
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary,
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
    """Set weights that matter, and blocks that add to the stream by factors from 0.15 to 1.2."""
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


def random_tokens(sequences: int, length: int, vocabulary: int = VOCABULARY) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, vocabulary, (sequences, length), generator=generator).tolist()


def block_drops(lm: TensorParallelLM, kinds: list[Sublayer] = ATTENTION) -> list[Experiment]:
    """Return the drops of every sync point of these kinds alone, by block_drop."""
    return list(experiments("single", [Strategy.BLOCK_DROP], num_blocks=lm.num_blocks, sync_points=kinds))


def token_metrics(dense: torch.Tensor, planned: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the metrics (predictions.FIELDS) of N tokens, [N, 6], from logits [N, V], as written by hand."""
    p, q = dense.log_softmax(-1), planned.log_softmax(-1)
    nll_dense, nll = (-x.gather(-1, targets[:, None])[:, 0] for x in (p, q))
    best_p, best_q = p.argmax(-1), q.argmax(-1)
    columns = (nll_dense, nll, (p.exp() * (p - q)).sum(-1), best_p == targets, best_q == targets, best_p == best_q)
    return torch.stack([c.double() for c in columns], dim=-1)


def by_hand(lm: TensorParallelLM, sequences: list[list[int]], kinds: list[Sublayer], batch: int) -> list[float]:
    """Return the KL of each candidate. Sequences are of one length, or else metrics are taken a row at a time."""
    rows = block_drops(lm, kinds)
    tallies = [Tally() for _ in rows]
    for input_ids, lengths in batches(sequences, batch, lm.device):
        dense = lm(input_ids)
        for row, tally in zip(rows, tallies, strict=True):
            with lm.running(row.drops):
                logits = lm(input_ids)
            for i, length in enumerate(lengths):
                found = token_metrics(dense[i, : length - 1], logits[i, : length - 1], input_ids[i, 1:length])
                tally.sums.append(found.sum(0))
                tally.tokens.append(length - 1)
    return [tally.kl() for tally in tallies]


def timed(run: Callable) -> tuple[float, object]:
    start = time.process_time()
    found = run()
    return time.process_time() - start, found


def compare(lm: TensorParallelLM, sequences: list[list[int]], kinds: list[Sublayer], target: float, batch: int) -> dict:
    def single(confidence: float | None = None) -> list:
        rows = block_drops(lm, kinds)
        return profile(Subject(lm), sequences, rows=rows, batch_size=batch, confidence=confidence)[1]

    by_hand(lm, sequences[:batch], kinds, batch)  # warm
    hand_seconds, hand = timed(lambda: by_hand(lm, sequences, kinds, batch))
    single_seconds, rows = timed(single)
    early_seconds, early = timed(lambda: single(0.95))
    fisher_seconds, (_, predicted) = timed(
        lambda: predict(lm, sequences, sync_points=kinds, target_stderr=target, batch_size=batch)
    )
    points = {
        (term[0].block, term[0].sync_point): predicted.of(term[0])[0] for term in predicted.terms if len(term) == 1
    }
    pairs = pandas.DataFrame([(points[r.block, r.sync_point], r.kl) for r in rows], columns=["predicted", "measured"])
    return {
        "sync_points": kinds,
        "sequences": len(sequences),
        "tokens": sum(map(len, sequences)),
        "by_hand_seconds": round(hand_seconds, 2),
        "single_seconds": round(single_seconds, 2),
        "single_of_by_hand": round(single_seconds / hand_seconds, 3),
        "largest_difference_of_kl": max(abs(a - r.kl) for a, r in zip(hand, rows, strict=True)),
        "early_seconds": round(early_seconds, 2),
        "early_of_by_hand": round(early_seconds / hand_seconds, 3),
        "early_share_of_measurements": round(sum(r.sequences for r in early) / len(sequences) / len(rows), 3),
        "early_same_tiers": all(
            tiers({r.block: r.kl for r in rows if r.sync_point == kind})
            == tiers({r.block: r.kl for r in early if r.sync_point == kind})
            for kind in kinds
        ),
        "samples": predicted.samples,
        "sampling_error": predicted.sampling_error,
        "fisher_seconds": round(fisher_seconds, 2),
        "fisher_of_single": round(fisher_seconds / single_seconds, 3),
        "spearman": round(float(pairs.corr("spearman").iloc[0, 1]), 4),
        "mean_kl": float(pairs["measured"].mean()),
    }


def share_of_floor(
    blocks: int, width: int, *, tp: int, sequences: int, length: int, vocabulary: int = VOCABULARY
) -> dict:
    """Return the time of all multiplications at the rate of a large matrix product, as a share of the time taken.

    They are those of the suffixes, of one head for every experiment, and of one for the dense model. The rate is that
    of one product of the batch with an MLP's matrix, for the head with the head's own.
    """
    lm = TensorParallelLM.simulated(random_llama(blocks, width, vocabulary), tp)
    text = random_tokens(sequences, length, vocabulary)
    tokens = sequences * length
    rate, head_rate = _rate(tokens, width, 3 * width), _rate(tokens, width, vocabulary)
    attention = 2 * width * (2 * width + 2 * width // 2)  # q, o; k and v of half the heads
    scores = 2 * 2 * length * width  # all positions, as the kernel may skip what is masked: at most this
    block = attention + 2 * 3 * width * 3 * width
    head = 2 * width * vocabulary
    passes = blocks + sum(blocks - first for first in range(blocks))
    floor = tokens * (passes * block / rate + (1 + blocks) * head / head_rate)
    seconds, _ = timed(lambda: profile(Subject(lm), text, rows=block_drops(lm), batch_size=sequences))
    return {
        "blocks": blocks,
        "width": width,
        "vocabulary": vocabulary,
        "tp": tp,
        "tokens": tokens,
        "matrix_rate_gflops": round(rate / 1e9, 1),
        "head_rate_gflops": round(head_rate / 1e9, 1),
        "profile_gflops": round(tokens * (passes * block + (1 + blocks) * head) / seconds / 1e9, 1),
        "share_of_floor": round(floor / seconds, 3),
        "attention_scores_left_out_of_flops": round(scores / block, 3),
    }


def floors() -> list[dict]:
    small = [share_of_floor(4, 1024, tp=tp, sequences=8, length=128) for tp in (2, 4)]
    shapes = ((12, 49152), (4, 262144))  # blocks, vocabulary
    return small + [share_of_floor(b, 640, tp=4, sequences=8, length=128, vocabulary=v) for b, v in shapes]


def _rate(rows: int, inner: int, columns: int) -> float:
    """Return the floating-point operations per second of a product [rows, inner] x [inner, columns]."""
    a, b = torch.randn(rows, inner), torch.randn(columns, inner)
    torch.nn.functional.linear(a, b)
    times = max(2, round(4e10 / (2 * a.numel() * columns)))
    seconds, _ = timed(lambda: [torch.nn.functional.linear(a, b) for _ in range(times)])
    return times * 2 * a.numel() * columns / seconds


def _grown(connection, what: str, blocks: int, width: int, vocabulary: int) -> None:
    """Send by how many bytes the process's peak grows: transformers' model, its simulation, or a profile."""
    torch.set_num_threads(1)
    model, sequences = random_llama(blocks, width, vocabulary), random_tokens(2 * BATCH, 128, vocabulary)
    forward: Callable = partial(torch.no_grad()(model), use_cache=False)
    if what != "dense":
        forward = lm = TensorParallelLM.simulated(model, 4)
    forward(torch.tensor(sequences[:1]))
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    if what != "profile":
        for input_ids, _ in batches(sequences, BATCH, torch.device("cpu")):
            forward(input_ids)
    else:
        profile(Subject(lm), sequences, rows=block_drops(lm), batch_size=BATCH)
    connection.send(_status("VmHWM") - before)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def memory(blocks: int, width: int, vocabulary: int) -> dict:
    grown = {}
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    for what in ("dense", "simulated", "profile"):
        here, there = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(
            target=_grown, args=(there, what, blocks, width, vocabulary)
        )
        process.start()
        grown[what] = here.recv()
        process.join()
    del os.environ["MALLOC_MMAP_THRESHOLD_"]
    hidden = (blocks + 1) * BATCH * 128 * width * 4
    return {
        "blocks": blocks,
        "width": width,
        "vocabulary": vocabulary,
        "dense_forward_mib": round(grown["dense"] / 2**20, 1),
        "simulated_forward_every_sync_kept_mib": round(grown["simulated"] / 2**20, 1),
        "hidden_states_of_a_batch_mib": round(hidden / 2**20, 1),
        "profile_mib": round(grown["profile"] / 2**20, 1),
        "profile_of_allowed": round(grown["profile"] / (grown["dense"] + hidden), 3),
    }


def killed(times: int) -> dict:
    """Profile the demo model, killed with SIGKILL while it measures and then continued; that many times.

    The moment: a random number of measurements stands in the journal, and a random part of a second has gone by.
    """
    dice = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "profile.json"
        command = [sys.executable, "-m", "spd_calib", "profile", "demo", "--tp", "4", "--data", "demo"]
        command += ["--seq-len", "64", "--max-samples", "48", "--sync-points", "attention,mlp", "-o", str(output)]
        subprocess.run(command, check=True, capture_output=True)
        expected = output.read_bytes()
        measurements = -(-48 // 8) * (
            1 + len(json.loads(expected)["measurements"])
        )  # batches of 8; the dense model, too
        journal = output.with_name("profile.json.journal")
        same, resumed = 0, []
        for _ in range(times):
            output.unlink(missing_ok=True)
            running = subprocess.Popen(command, stderr=subprocess.DEVNULL)
            wanted = dice.randrange(measurements)
            while running.poll() is None and _lines(journal) - 1 < wanted:
                time.sleep(0.001)
            time.sleep(dice.uniform(0.0, 0.02))
            running.kill()
            running.wait()
            resumed.append(max(_lines(journal) - 1, 0))
            subprocess.run(command, check=True, capture_output=True)
            same += output.read_bytes() == expected
    return {"killed": times, "measurements_finished_by_then": resumed, "same_file": same}


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", type=Path, default=Path("results/benchmarks/profiling.json"))
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--kills", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    done: dict = {"versions": versions(), "models": []}

    def row(name: str, tp: int, lm: TensorParallelLM, sequences: list, kinds: list, target: float) -> None:
        rows = compare(lm, sequences, kinds, target, BATCH)
        done["models"].append({"model": name, "blocks": lm.num_blocks, "tp": tp, **rows})
        print(done["models"][-1], flush=True)

    for name, model, kinds in (
        ("random Llama, width 128", random_llama(24, 128), ATTENTION),
        ("random Llama, width 64", random_llama(80, 64), ATTENTION),
        ("random OPT, width 64", random_opt(8, 64), BOTH),
    ):
        tokens = random_tokens(options.sequences // (2 if name.endswith("64") else 1), 32)
        row(name, 4, TensorParallelLM.simulated(model, 4), tokens, kinds, 0.1)
    for (name, (folder, data, _)), tp, length in itertools.product(MODELS.items(), (2, 4), (64, 128)):
        if not folder.exists():
            print(f"{folder} is not here: left out")
            continue
        session = open_session(str(folder), tp)
        count = 2 * options.sequences * 64 // length
        text = load_text(TextOptions(str(data), length, length // 2, count, 8), session.tokenizer)
        name = f"{name}, {length} tokens a sequence"
        row(name, tp, session.load(), text.calibration, BOTH, 0.08)
    for name, run in (
        ("floor", floors),
        ("memory", lambda: [memory(24, 256, VOCABULARY), memory(24, 256, 32000)]),
        ("killed", lambda: killed(options.kills)),
    ):
        done[name] = run()
        print(name, done[name], flush=True)
        options.o.parent.mkdir(parents=True, exist_ok=True)
        options.o.write_text(json.dumps(done, indent=1) + "\n")


if __name__ == "__main__":
    main()
