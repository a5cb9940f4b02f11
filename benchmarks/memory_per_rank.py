"""How much memory a real rank needs to load its share of a model, against the least it could need.

    .venv/bin/python benchmarks/memory_per_rank.py        writes results/benchmarks/memory_per_rank.json

A random Llama is made in a temporary folder. Every rank reports the most memory it ever held while loading
(the kernel's VmHWM, files it has mapped included) beyond what it held before. The least possible is
1/N of the weights that are cut and all of those that are replicated.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

RESULT = Path(__file__).parent.parent / "results" / "benchmarks" / "memory_per_rank.json"
SHAPE = {
    "vocab_size": 16000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
}
MIB = 2**20
LARGEST = 16000 * 1024 * 4  # bytes of the largest tensor, the embedding: held twice while it is read


def make(folder: Path) -> None:
    """Write a random Llama of about 640 MiB in float32, in files of 200 MB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(folder, max_shard_size="200MB")


def memory(field: str) -> int:
    """Return a field of /proc/self/status in bytes: VmRSS is held now, VmHWM the most ever."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def rank_main(folder: str, ranks: int) -> None:
    """Load the model on one rank, and write down what that took. Runs under torchrun."""
    from spd_calib.models.load import locate, read_config
    from spd_calib.models.shard_load import load_sharded, own_slices
    from spd_calib.parallel import distributed
    from spd_calib.parallel.model import TensorParallelLM
    from spd_calib.parallel.small_copy import check_small_copy

    comm = distributed.start(ranks)
    source = locate(folder)
    config = read_config(source)
    check_small_copy(config)  # before any weight is read, so that its memory is free again
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = memory("VmRSS")
    model = load_sharded(source, config, rank=comm.rank, tp=ranks, device="cpu", dtype="float32")
    peak, held = memory("VmHWM") - before, memory("VmRSS") - before
    own = own_slices(model, rank=comm.rank, tp=ranks)
    sizes = {name: p.numel() * p.element_size() for name, p in model.named_parameters()}
    cut = sum(size for name, size in sizes.items() if name in own)
    lm = TensorParallelLM(model, comm, sharded=True)
    lm(torch.arange(32)[None])
    found = {"rank": comm.rank, "peak": peak, "held": held, "cut": cut, "replicated": sum(sizes.values()) - cut}
    Path(folder, f"rank_{comm.rank}_of_{ranks}.json").write_text(json.dumps(found))


def measure(folder: Path, ranks: int) -> dict:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", __file__, str(folder), str(ranks)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    rows = [json.loads((folder / f"rank_{rank}_of_{ranks}.json").read_text()) for rank in range(ranks)]
    worst = max(rows, key=lambda row: row["peak"])
    least = worst["cut"] + worst["replicated"]
    return {
        "ranks": ranks,
        "cut_mib": worst["cut"] / MIB,
        "replicated_mib": worst["replicated"] / MIB,
        "peak_mib": worst["peak"] / MIB,
        "held_mib": worst["held"] / MIB,
        "beyond_least_mib": (worst["peak"] - least) / MIB,
        "peak_over_least": worst["peak"] / least,
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        total = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        print(f"a Llama of {total / MIB:.0f} MiB; the largest tensor has {LARGEST / MIB:.0f} MiB", file=sys.stderr)
        rows = []
        for ranks in (2, 4):
            rows.append(measure(Path(folder), ranks))
            print(
                f"{ranks} ranks: peak {rows[-1]['peak_mib']:.0f} MiB a rank, least possible "
                f"{rows[-1]['cut_mib'] + rows[-1]['replicated_mib']:.0f} ({rows[-1]['cut_mib']:.0f} cut, "
                f"{rows[-1]['replicated_mib']:.0f} replicated): ratio {rows[-1]['peak_over_least']:.2f}",
                file=sys.stderr,
            )
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    document = {"model_mib": total / MIB, "largest_tensor_mib": LARGEST / MIB, "shape": SHAPE, "rows": rows}
    RESULT.write_text(json.dumps(document, indent=1) + "\n")
    if any(row["beyond_least_mib"] > 1.5 * LARGEST / MIB for row in rows):
        sys.exit("a rank held more than its share and a small constant")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        rank_main(sys.argv[1], int(sys.argv[2]))
    else:
        main()
