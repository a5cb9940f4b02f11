"""The latency model against published figures, and against steps measured here.

    .venv/bin/python benchmarks/latency_model.py [--rounds 20]

Published: a LLaMA2-70B on 8 ranks. Measured: the demo model on two gloo ranks of this machine (`spd-calib bench`); the
model is given the dense steps and the all-reduces timed alone, and predicts the steps with every attention's sync point
dropped. Writes results/latency/model.json.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from spd_calib.errors import InputError
from spd_calib.formats.files import read
from spd_calib.formats.hardware import Hardware
from spd_calib.parallel.session import versions
from spd_calib.planning.latency import Step
from spd_calib.planning.machine_latency import as_measured, held_against, on_machine
from spd_calib.planning.machine_tables import load, shipped
from spd_calib.planning.model_sizes import ModelSizes

ROOT = Path(__file__).resolve().parent.parent
LLAMA2_70B = {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
              "intermediate_size": 28672, "vocab_size": 32000}  # fmt: skip
STEPS = [Step("decode", 1, 1024, 2), Step("prefill", 1, 4096, 2)]
PUBLISHED = {
    "every attention sync point dropped, LLaMA2-70B on 8 GPUs (SPD, arXiv 2502.20727): about": 0.20,
    "all communication, a 70B at TP 8, batch 1 (Ladder-Residual's upper bound)": 0.30,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    with torch.device("meta"):
        sizes = ModelSizes.of(AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA2_70B)))
    rows = []
    for name in (name for name in shipped() if load(name).ranks == 8):
        for step in STEPS:
            model = on_machine(load(name), sizes, tp=8, step=step)
            rows.append({
                "hardware": name, "phase": step.phase, "batch": step.batch, "context": step.context,
                "dense_ms": 1e3 * model.seconds(0), "attention_saved": model.saved(80),
                "communication": model.saved(160),
            })  # fmt: skip
            print(json.dumps(rows[-1]))
    document = {
        "command": f"python benchmarks/latency_model.py --rounds {args.rounds}", "versions": versions(),
        "llama2_70b_tp8": rows, "published": PUBLISHED, "measured": measured(args.rounds),
    }  # fmt: skip
    (ROOT / "results" / "latency" / "model.json").write_text(json.dumps(document, indent=1) + "\n")


def measured(rounds: int) -> dict:
    """Return `bench` of the demo model at TP 2, and how far the latency model's steps are from those timed."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)

        def run(*words: str) -> None:
            subprocess.run([sys.executable, "-m", "spd_calib", *words], check=True, cwd=ROOT)

        options = ["--tp", "2", "--data", "demo", "--seq-len", "64", "--min-len", "32"]
        run("profile", "demo", *options, "--max-samples", "16", "--verify-samples", "8", "-o", f"{folder}/profile.json")
        run("plan", f"{folder}/profile.json", "--drop", "4", "-o", f"{folder}/plan.json")
        run("bench", f"{folder}/plan.json", "--rounds", str(rounds), "-o", f"{folder}/hardware.json")
        hardware = read(Hardware, folder / "hardware.json")
    from spd_calib.demo.assets import model_dir

    sizes = ModelSizes.of(AutoModelForCausalLM.from_pretrained(model_dir()))
    rows = []
    for step in STEPS:
        try:
            model = as_measured(hardware, sizes, phase=step.phase, name="hardware.json")
        except InputError as e:  # on a noisy machine a sum timed alone can take longer than one within a step
            rows.append({"phase": step.phase, "refused": str(e)})
            print(json.dumps(rows[-1]))
            continue
        for blocks, (predicted, seen) in held_against(hardware, model).items():
            rows.append({
                "phase": step.phase, "blocks": blocks, "dense_ms": 1e3 * model.seconds(0),
                "predicted_ms": 1e3 * predicted, "measured_ms": 1e3 * seen, "error": predicted / seen - 1,
            })  # fmt: skip
            print(json.dumps(rows[-1]))
    return {"device": hardware.device, "backend": hardware.backend, "tp": 2, "rounds": rounds, "steps": rows}


if __name__ == "__main__":
    main()
