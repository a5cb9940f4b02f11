"""What one data-centre GPU says in ten minutes: a dropped sync point's price, and that the rest runs on a GPU at all.

    python benchmarks/gpu.py             writes results/gpu/STEP.json, each when it is found
    python benchmarks/gpu.py --toy       the same on a CPU, at toy sizes: does it run? Its times mean nothing.

For a bare machine with torch 2.11 or newer, transformers and pydantic; no vLLM, no network, nothing to download. Every
step is a process of its own with a deadline, so that one that fails or hangs costs no other its result:

    price     layers of a 70B at TP 8, compiled, in a CUDA graph: what a drop saves, and kernels a layer; and in
              price_one_kernel the same where the norm is part of the all-reduce's kernel
    cache     compiled against eager in bfloat16; saved, and loaded by another process, to the same bits
    check     `check --runtime torchrun` at TP 2, both ranks on the one card, over gloo
    profile   a random Llama of 1B in bfloat16: tokens a second, share of the measured matrix rate, memory
    recover   the closed form on it, two blocks

All-reduces are played by a kernel that waits: one GPU cannot tell what they take, only what is left without them.
"""

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results" / "gpu"
DEADLINES = {"price": 130, "price_one_kernel": 130, "cache": 80, "check": 80, "profile": 80, "recover": 80}  # seconds
TOY_DEADLINE = 600
MICROSECONDS = (5.3, 12.0)  # of an all-reduce: one kernel with the norm on NVLink; without
BATCHES = (1, 8, 32, 64)
LLAMA_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
LLAMA_TOY = LLAMA_1B | {
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "head_dim": 8,
}


def price_one_kernel(toy: bool, folder: Path) -> dict[str, Any]:
    """Return what a drop saves where one kernel reduces, adds the residual stream and normalises."""
    return _price(toy, norm_reduces=True)


def price(toy: bool, folder: Path) -> dict[str, Any]:
    """Return what a drop saves where the norm is a kernel of its own behind the all-reduce."""
    return _price(toy, norm_reduces=False)


def _price(toy: bool, *, norm_reduces: bool) -> dict[str, Any]:
    import gpu_layers as ours
    import torch

    sizes, count, context, repeats = (ours.TOY, 2, 16, 3) if toy else (ours.LLAMA_70B_TP8, 4, 1024, 20)
    device, dtype = ("cpu", torch.float32) if toy else ("cuda", torch.bfloat16)
    a_microsecond = 0.0 if toy else _cycles_a_microsecond()
    ours.stand_in(norm_reduces=norm_reduces)
    compiled, rows = {}, []
    for variant in ours.VARIANTS:
        layers = ours.Layers(sizes, variant, count=count, norm_reduces=norm_reduces).to(device, dtype).eval()
        compiled[variant] = torch.compile(layers, dynamic=True, backend="eager" if toy else "inductor")
    for batch in BATCHES[:2] if toy else BATCHES:
        given = ours.inputs_of(sizes, batch=batch, context=context, device=device, dtype=dtype)
        for microseconds in MICROSECONDS:
            ours.all_reduce_takes[:] = [microseconds * a_microsecond, microseconds / 1e6]
            took = {v: ours.seconds_a_call(layers, given, repeats=repeats) for v, layers in compiled.items()}
            rows += [
                {
                    "batch": batch,
                    "all_reduce_microseconds": microseconds,
                    "layers": variant,
                    "microseconds_a_layer": 1e6 * seconds / count,
                    "saved_microseconds_a_drop": 1e6 * (took["kept"] - seconds) / count,
                    "kernels_a_layer": None if toy else ours.kernels_a_call(compiled[variant], given) / count,
                }
                for variant, seconds in took.items()
            ]
    return {"layers_a_call": count, "context": context, "rows": rows}


def _cycles_a_microsecond() -> float:
    """Return the GPU's clock while it is busy, by waiting for two numbers of cycles."""
    import torch

    def seconds(cycles: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        torch.cuda._sleep(cycles)
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3

    seconds(10**9)  # the clock rises under load
    few, many = seconds(10**7), seconds(10**8)
    return (10**8 - 10**7) / (many - few) / 1e6


def cache(toy: bool, folder: Path) -> dict[str, Any]:
    """Return how far compiled layers are off eager ones, and whether a fresh process computes the same from a cache."""
    first = _in_a_process("cache_written", toy, folder)
    second = _in_a_process("cache_read", toy, folder)
    return {**first, **second}


def cache_written(toy: bool, folder: Path) -> dict[str, Any]:
    import torch

    layers, given = _layers_of_cache(toy)
    with torch.no_grad():
        eager, compiled = layers(*given), torch.compile(layers)(*given)
    artifacts = torch.compiler.save_cache_artifacts()
    assert artifacts is not None
    (folder / "artifacts").write_bytes(artifacts[0])
    torch.save([t.cpu() for t in compiled], folder / "compiled.pt")
    off = max(float((c - e).abs().max() / e.abs().max()) for c, e in zip(compiled, eager, strict=True))
    return {"compiled_off_eager": off, "dtype": str(given[0].dtype).removeprefix("torch.")}


def cache_read(toy: bool, folder: Path) -> dict[str, Any]:
    import torch
    from torch._dynamo.utils import counters

    torch.compiler.load_cache_artifacts((folder / "artifacts").read_bytes())
    layers, given = _layers_of_cache(toy)
    with torch.no_grad():
        compiled = torch.compile(layers)(*given)
    expected = torch.load(folder / "compiled.pt", weights_only=True)
    hits = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
    same = all(torch.equal(c.cpu(), e) for c, e in zip(compiled, expected, strict=True))
    return {"cache_hits_in_a_fresh_process": hits, "same_bits_in_a_fresh_process": same}


def _layers_of_cache(toy: bool) -> tuple[Any, tuple]:
    import gpu_layers as ours
    import torch

    ours.stand_in(norm_reduces=False)
    sizes, device = (ours.TOY, "cpu") if toy else (ours.LLAMA_70B_TP8, "cuda")
    layers = ours.Layers(sizes, "dropped", count=2, norm_reduces=False).to(device, torch.bfloat16).eval()
    return layers, ours.inputs_of(sizes, batch=8, context=16, device=device, dtype=torch.bfloat16)


def check(toy: bool, folder: Path) -> dict[str, Any]:
    """Return the rows of a check of real ranks: the shipped model, three sync points dropped."""
    import spd_calib
    from spd_calib.formats.files import dumps, write_text

    run = spd_calib.RunOptions(device="cpu" if toy else "cuda", dtype="float32")
    text = spd_calib.TextSelection(seq_len=32, max_samples=4, verify_samples=4)
    plan = spd_calib.plan(spd_calib.profile("demo", tp=2, data="demo", text=text, run=run), drop=3, run=run)
    write_text(folder / "plan.json", dumps(plan))
    found = spd_calib.check(folder / "plan.json", runtime="torchrun", new_tokens=4 if toy else 16, run=run)
    rows = [{"what": r.what, "expected": r.expected, "found": r.found, "ok": r.ok} for r in found.rows]
    return {"ok": found.ok, "rows": rows}


def profile(toy: bool, folder: Path) -> dict[str, Any]:
    """Return what profiling a random Llama takes, every attention sync point dropped alone."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    import spd_calib
    from spd_calib.demo import assets
    from spd_calib.formats.files import dumps, write_text

    device, dtype = ("cpu", "float32") if toy else ("cuda", "bfloat16")
    rate = _matrix_rate(512 if toy else 8192, device, getattr(torch, dtype))
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**(LLAMA_TOY if toy else LLAMA_1B), dtype=dtype))
    model = model.to(getattr(torch, dtype)).eval()
    model.save_pretrained(folder / "llama")
    AutoTokenizer.from_pretrained(assets.model_dir()).save_pretrained(folder / "llama")
    blocks = sum(p.numel() for p in model.model.layers.parameters())
    head = model.lm_head.weight.numel()
    del model
    options = {
        "tp": 8,
        "data": "demo",
        "text": spd_calib.TextSelection(
            seq_len=32 if toy else 512, max_samples=4 if toy else 16, verify_samples=4, pack=True
        ),
        "strategies": ["block_drop"],
        "run": spd_calib.RunOptions(device=device, dtype=dtype, batch_size=4),
    }
    counted = spd_calib.estimate_profile(str(folder / "llama"), **options)
    if not toy:
        torch.cuda.reset_peak_memory_stats()
    begun = time.monotonic()
    found = spd_calib.profile(str(folder / "llama"), **options)
    seconds = time.monotonic() - begun
    write_text(folder / "of_llama.json", dumps(found))
    passed = counted.forwards * counted.tokens
    products = 2 * (passed * blocks + (len(found.measurements) + 1) * counted.tokens * head)
    return {
        "parameters": blocks + head,
        "seconds": seconds,
        "seconds_estimated": counted.seconds,
        "tokens": counted.tokens,
        "forwards": counted.forwards,
        "tokens_a_second": passed / seconds,
        "matrix_flops_a_second": rate,
        "share_of_matrix_rate": products / seconds / rate,
        "peak_gib": None if toy else torch.cuda.max_memory_allocated() / 2**30,
        "kl": {m.block: m.kl for m in found.measurements},
    }


def _matrix_rate(n: int, device: str, dtype: Any) -> float:
    """Return the operations a second of a product of two n x n matrices."""
    import torch

    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        if device == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(10):
            torch.mm(a, b)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - begun) / 10)
    return 2 * n**3 / best


def recover(toy: bool, folder: Path) -> dict[str, Any]:
    """Return what recovering two blocks of the profiled model in closed form takes, and what it leaves."""
    import torch

    import spd_calib
    from spd_calib.formats.files import dumps, write_text

    if not (folder / "of_llama.json").is_file():
        raise FileNotFoundError("the step `profile` left no profile to plan from")
    run = spd_calib.RunOptions(device="cpu" if toy else "cuda", dtype="float32", batch_size=4)
    plan = spd_calib.plan(folder / "of_llama.json", drop=2, run=run)
    write_text(folder / "dropped.json", dumps(plan))
    text = spd_calib.TextSelection(max_samples=10 if toy else 64, pack=True)
    begun = time.monotonic()
    made = spd_calib.recover(
        folder / "dropped.json", folder / "recovered", data="demo", text=text, tau1=0.0, tau2=0.0, run=run
    )
    return {
        "seconds": time.monotonic() - begun,
        "peak_gib": None if toy else torch.cuda.max_memory_allocated() / 2**30,
        "kl_of_the_plan": plan.verified.kl if plan.verified else None,
        "kl_recovered": made.verified.kl if made.verified else None,
    }


STEPS: dict[str, Callable[[bool, Path], dict[str, Any]]] = {
    step.__name__: step for step in (price, price_one_kernel, cache, check, profile, recover, cache_written, cache_read)
}


def _in_a_process(step: str, toy: bool, folder: Path, *, deadline: float | None = None) -> dict[str, Any]:
    """Return what a step finds in a process of its own. Raises RuntimeError where it fails or takes longer."""
    command = [sys.executable, __file__, "--step", step, "--folder", str(folder), *(["--toy"] if toy else [])]
    with (folder / f"{step}.log").open("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            code = process.wait(deadline)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"not done after {deadline:g} s") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with the ranks that it may have started
            process.wait()
        log.seek(0)
        if code:
            raise RuntimeError((log.read().strip().splitlines() or ["no message"])[-1])
    return json.loads((folder / f"{step}.found").read_text())


def machine(toy: bool) -> dict[str, str]:
    import torch
    import transformers

    name = platform.processor() or platform.machine() if toy else torch.cuda.get_device_name()
    return {"device": name, "torch": torch.__version__, "transformers": transformers.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="on a CPU, at toy sizes")
    parser.add_argument("--only", nargs="+", choices=list(DEADLINES), default=list(DEADLINES), metavar="STEP")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    parser.add_argument("--step", choices=list(STEPS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if args.step:
        found = STEPS[args.step](args.toy, args.folder)
        (args.folder / f"{args.step}.found").write_text(json.dumps(found))
        return
    args.output.mkdir(parents=True, exist_ok=True)
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for step in args.only:
            begun, deadline = time.monotonic(), TOY_DEADLINE if args.toy else DEADLINES[step]
            try:
                found = _in_a_process(step, args.toy, Path(folder), deadline=deadline)
            except Exception as e:
                found, failed = {"error": str(e)}, True
            found = {"toy": args.toy, **machine(args.toy), "step_seconds": time.monotonic() - begun, **found}
            (args.output / f"{step}.json").write_text(json.dumps(found, indent=1) + "\n")
            print(f"{step}: {found.get('error', 'done')} ({found['step_seconds']:.0f} s)", file=sys.stderr, flush=True)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
