"""A random Llama of 4 GB on disk, profiled and recovered with its blocks read from disk: memory at its peak, and time.

Memory is anonymous memory: what a process holds, without files that lie in the cache.

    .venv/bin/python benchmarks/streaming.py [--gib 4]

The model is made in build/streaming and stays there. Writes results/benchmarks/streaming.json.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")
ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "streaming"
SHAPE = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 8}
VOCABULARY = 2048


def make(folder: Path, blocks: int) -> None:
    """Write random weights block by block: this process, too, stays small."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SHAPE, vocab_size=VOCABULARY, num_hidden_layers=blocks, max_position_embeddings=2048)
    with torch.device("meta"):
        names = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    index: dict[str, str] = {}
    for part in range(-1, blocks):
        prefix = f"model.layers.{part}."
        chosen = [n for n in names if (n.startswith(prefix) if part >= 0 else ".layers." not in n)]
        tensors = {n: torch.randn(names[n]) * 0.02 if len(names[n]) == 2 else torch.ones(names[n]) for n in chosen}
        file = f"model-{part + 1:05d}-of-{blocks:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(chosen, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "spd_calib" / "demo" / "model").save_pretrained(folder)


def anonymous_mib(pid: int) -> float:
    """Return the anonymous memory of a process and its children, resident and swapped."""
    total = 0
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(("RssAnon", "VmSwap", "RssShmem")):
            total += int(line.split()[1])
    return total / 1024 + sum(anonymous_mib(int(child)) for child in children)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=4.0)
    args = parser.parse_args()
    d, f = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    kv = d * SHAPE["num_key_value_heads"] // SHAPE["num_attention_heads"]
    block_bytes = 4 * (2 * d * d + 2 * d * kv + 3 * d * f)
    blocks = -(-int(args.gib * 2**30) // block_bytes)
    if not (FOLDER / "config.json").exists():
        make(FOLDER, blocks)
    on_disk = sum(p.stat().st_size for p in FOLDER.glob("*.safetensors"))
    profile, plan, recovered = (
        FOLDER.parent / f"streaming-{name}" for name in ("profile.json", "plan.json", "recovered")
    )
    shutil.rmtree(recovered, ignore_errors=True)
    text = ["--data", "demo", "--stream", "--seq-len", "64", "--verify-samples", "2", "--batch-size", "8"]
    rows = [
        measured(
            "profile", FOLDER, "--tp", "4", *text, "--max-samples", "8", "--strategy", "block_drop", "-o", profile
        ),
        measured("plan", profile, "--drop", "100%", "-o", plan),
        measured("recover", plan, *text, "--max-samples", "16", "--methods", "compensation", "-o", recovered),
    ]
    document = {"bytes_on_disk": on_disk, "blocks": blocks, "block_bytes": block_bytes, "rows": rows}
    (ROOT / "results" / "benchmarks" / "streaming.json").write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=1))


def measured(*arguments: str | Path) -> dict:
    """Run a command of spd-calib on the CPU; return the command, its peak of memory, and its seconds."""
    given = [str(a).replace(f"{ROOT}/", "") for a in arguments] + ["--device", "cpu"]
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "spd_calib", *given], cwd=ROOT)
    peak = 0.0
    while process.poll() is None:
        with contextlib.suppress(OSError):  # a process that is gone has none
            peak = max(peak, anonymous_mib(process.pid))
        time.sleep(0.05)
    if process.returncode:
        sys.exit(process.returncode)
    return {
        "command": f"spd-calib {' '.join(given)}",
        "peak_anonymous_mib": round(peak, 1),
        "seconds": round(time.monotonic() - began, 1),
    }


if __name__ == "__main__":
    main()
