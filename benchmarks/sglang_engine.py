"""SGLang's own engine on a CPU, at TP 2, dense and with a plan, against the simulation.

    pip download --no-deps sglang==0.5.23 && unzip -d sglang-wheel sglang-0.5.23-*.whl
    .venv-vllm/bin/python benchmarks/sglang_engine.py --wheel sglang-wheel [--packages FOLDER] [--family llama]

SGLang is not installed: its wheel is unpacked and put on the path, with the packages it wants besides (`--packages`, a
folder that `pip install --no-deps --target` filled with those that Python says are missing). What needs a GPU or reads
images (sgl_kernel, torchvision) is stood in for by empty modules, which a Llama or Qwen in float32 never calls. So this
is SGLang's scheduler, model runner, layers, stage boundaries, cache and sampler, with its attention in plain PyTorch
and its all-reduces over gloo; none of the kernels, graphs and fusions that a GPU has.

Writes results/benchmarks/sglang_engine.json, a row an engine as soon as it is there.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from spd_calib.formats.drops import NOTHING_DROPPED
from spd_calib.models.plan_files import load_plan
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.runtimes.checks import largest_difference
from spd_calib.runtimes.simulation import simulate

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests")]

import tiny  # noqa: E402
from plans import write_plan  # noqa: E402

OUT = ROOT / "results" / "benchmarks" / "sglang_engine.json"

K, D, P = "keep_sync", "block_drop", "plain_drop"
ATTENTION, MLP, KINDS = [D, P, K, D], [K, D, D, K], ["full", None, None, "low_rank"]
SHAPE = {"layers": 4, "hidden": 128, "heads": 4, "kv_heads": 2, "intermediate": 256, "vocab_size": 512}
FAMILIES = {"llama": {"attention_bias": True}, "qwen2": {}, "qwen3": {"head_dim": 32}}
PROMPTS = [[1, 403, 407, 261, 378, 36, 52, 201, 99, 133, 44], [1, 70, 71, 301, 22]]
NEW = 6

STAND_INS = """
import importlib.abc, importlib.machinery, os, sys, types

class Nothing:
    def __init__(self, *_, **__): pass
    def __call__(self, *given, **named):
        return given[0] if len(given) == 1 and callable(given[0]) and not named else self
    def __getattr__(self, name):
        if name.startswith("__"): raise AttributeError(name)
        return Nothing()
    def __getitem__(self, _): return self
    def __or__(self, _): return self
    __ror__ = __or__
    def __iter__(self): return iter(())

class Absent(types.ModuleType):
    __path__ = []
    def __getattr__(self, name):
        if name.startswith("__"): raise AttributeError(name)
        return Nothing()

class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torchvision", "sgl_kernel"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
    def create_module(self, spec): return Absent(spec.name)
    def exec_module(self, module): pass

if os.environ.get("SPD_STAND_INS"):
    from transformers.utils import import_utils
    import_utils.is_torchvision_available()  # transformers is to know that there is none
    sys.meta_path.append(Finder())
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, required=True, help="the folder that holds `sglang`, unpacked")
    parser.add_argument("--packages", type=Path, help="a folder with what else it imports")
    parser.add_argument("--family", choices=FAMILIES, action="append", help="default: all")
    parser.add_argument("--serve", type=Path, help="start an engine on this folder, and print what it does")
    args = parser.parse_args()
    if args.serve:
        print(json.dumps(engine(args.serve)))
        return
    rows: list[dict] = []
    with sglang_environment(args.wheel.resolve(), args.packages and args.packages.resolve()) as environment:
        for family in args.family or FAMILIES:
            for row in compared(family, environment):
                rows.append(row)
                print(json.dumps(row, ensure_ascii=False), flush=True)
                document = {"command": " ".join(["benchmarks/sglang_engine.py", *sys.argv[1:]]), "rows": rows}
                OUT.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def sglang_environment(wheel: Path, packages: Path | None) -> Iterator[dict[str, str]]:
    """Yield an environment in which SGLang can be imported, with its plugin, by a process and all that it starts."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "sitecustomize.py").write_text(STAND_INS)
        plugin = Path(folder, "spd_calib_in_sglang-0.dist-info")
        plugin.mkdir()
        (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: spd-calib-in-sglang\nVersion: 0\n")
        entry = "[sglang.srt.plugins]\nspd_calib = spd_calib.runtimes.sglang.plugin:register\n"
        (plugin / "entry_points.txt").write_text(entry)
        path = [folder, str(ROOT), str(wheel), *([str(packages)] if packages else [])]
        yield {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path),
            "SPD_STAND_INS": "1",
            "SGLANG_USE_CPU_ENGINE": "1",
            "SGLANG_CPU_OMP_THREADS_BIND": "0|1",
            "SGLANG_PLUGINS": "spd_calib",
        }


def compared(family: str, environment: Mapping[str, str]) -> Iterator[dict]:
    """Run a tiny random model of a family with a plan and without; how far both are off the simulation of either."""
    with tempfile.TemporaryDirectory() as place:
        model = tiny.build(family, **SHAPE, **FAMILIES[family])
        folder = tiny.save(model, Path(place, "model"))
        path = write_plan(Path(place, "plan.json"), folder, 2, ATTENTION, MLP, KINDS)
        lm = TensorParallelLM.simulated(model, 2)
        of_plan = load_plan(path)[1]
        for name, plan, drops, others in (
            ("plan", path, of_plan, NOTHING_DROPPED),
            ("dense", None, NOTHING_DROPPED, of_plan),
        ):
            named = {"SPD_PLAN": str(plan)} if plan else {}
            command = [sys.executable, __file__, "--wheel", ".", "--serve", str(folder)]
            done = subprocess.run(command, env={**environment, **named}, stdout=subprocess.PIPE, text=True, check=True)
            prompt, tokens, chosen = json.loads(done.stdout.splitlines()[-1])
            own, other = (simulate(lm, PROMPTS, continuations=tokens, drops=d) for d in (drops, others))
            yield {
                "family": family,
                "engine": name,
                "torch": torch.__version__,
                "max |Δ log p|, prompt": largest_difference(prompt, own.prompt),
                "max |Δ log p|, continuation": largest_difference(chosen, own.chosen),
                "its tokens are the likeliest, to": largest_difference(own.best, own.chosen),
                "off the other": largest_difference(prompt, other.prompt),
            }


def engine(folder: Path) -> tuple[Sequence, Sequence, Sequence]:
    """Start SGLang, and return log-probabilities of the prompts, and tokens of their continuations with theirs."""
    from sglang.srt.entrypoints.engine import Engine

    served = Engine(
        model_path=str(folder),
        tp_size=2,
        dtype="float32",
        device="cpu",
        attention_backend="torch_native",
        sampling_backend="pytorch",
        grammar_backend="none",
        skip_tokenizer_init=True,
        skip_server_warmup=True,
        disable_overlap_schedule=True,
        max_total_tokens=2048,
        mem_fraction_static=0.1,
    )
    try:
        sampling = {"temperature": 0, "max_new_tokens": NEW, "ignore_eos": True}
        outputs = served.generate(input_ids=PROMPTS, sampling_params=sampling, return_logprob=True, logprob_start_len=0)
    finally:
        served.shutdown()
    found = [output["meta_info"] for output in outputs]
    prompt = [[log_p for log_p, *_ in of["input_token_logprobs"][1:]] for of in found]
    tokens = [[token for _, token, *_ in of["output_token_logprobs"]] for of in found]
    return prompt, tokens, [[log_p for log_p, *_ in of["output_token_logprobs"]] for of in found]


if __name__ == "__main__":
    main()
