"""Measured against modelled over links of limited rates: prefill and decode of the demo model, TP 2.

    sudo .venv/bin/python benchmarks/limited_link.py      writes results/latency/limited_link.json (some 10 minutes)

Two ranks on gloo, one thread each, in network namespaces of their own, joined by a pair of virtual devices; the kernel
lets through as many bits a second as is set (tc, a token bucket). Over each link `spd-calib bench` times the plans one
after the other, each beside the dense model in the same run; the latency model knows of that run its dense step and its
sums timed alone, nothing of the plan's step. The planner's own plans are made with the first of these files: one as
fast as every sync at 8 bits, one as fast as every attention's sync dropped, by the model, at the least KL. Wants root,
`ip`, `tc`, `nsenter`, `chrt` and the kernel's veth and tbf.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

import spd_calib
from spd_calib.demo.assets import model_dir
from spd_calib.errors import InputError, SpdError
from spd_calib.formats.files import dumps, read, write_text
from spd_calib.formats.hardware import Hardware
from spd_calib.formats.phases import PHASES, Phase
from spd_calib.formats.plan import Plan
from spd_calib.parallel.session import versions
from spd_calib.planning.latency import LatencyModel
from spd_calib.planning.machine_latency import as_measured, held_against
from spd_calib.planning.model_sizes import ModelSizes, added_by

ROOT = Path(__file__).resolve().parent.parent
RATES = {"1 Gbit/s": "1gbit", "10 Gbit/s": "10gbit"}
ADDRESSES = ("10.78.0.1", "10.78.0.2")
PORT = 29622
BATCH, TOKENS, NEW_TOKENS = 8, 192, 4
REALTIME = ["chrt", "--fifo", "10"]  # what else runs on this machine is not what is measured
EVERY = "every attention dropped"


@contextlib.contextmanager
def limited_link(rate: str) -> Iterator[list[int]]:
    """Yield two processes, by id, in whose namespaces the ends of a link of this rate are; both end with it."""
    holders = [subprocess.Popen(["unshare", "--net", "sleep", "infinity"]) for _ in ADDRESSES]
    try:
        pids = [holder.pid for holder in holders]
        own = os.readlink("/proc/self/ns/net")
        while any(os.readlink(f"/proc/{pid}/ns/net") == own for pid in pids):
            time.sleep(0.01)  # until `unshare` has made them
        inside(pids[0], f"ip link add rank0 type veth peer name rank1 netns {pids[1]}")
        for i, (pid, address) in enumerate(zip(pids, ADDRESSES, strict=True)):
            inside(pid, "ip link set lo up")
            inside(pid, f"ip address add {address}/24 dev rank{i}")
            inside(pid, f"ip link set rank{i} mtu 9000 up")
            inside(pid, f"tc qdisc add dev rank{i} root tbf rate {rate} burst 128kb latency 400ms")
        yield pids
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()


def inside(pid: int, command: str) -> None:
    subprocess.run(["nsenter", f"--net=/proc/{pid}/ns/net", *command.split()], check=True)


def bench(plan: Path, out: Path, pids: list[int], rounds: int) -> Hardware:
    """Return what `spd-calib bench` writes on the two ends of the link, each taken for a machine of its own."""
    ranks = []
    for i, pid in enumerate(pids):
        environment = os.environ | {
            "RANK": str(i), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": str(PORT), "GLOO_SOCKET_IFNAME": f"rank{i}",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
        }  # fmt: skip
        words = ["bench", plan, "-o", out, "--rounds", rounds, "--batch-size", BATCH, "--tokens", TOKENS,
                 "--new-tokens", NEW_TOKENS, "--device", "cpu"]  # fmt: skip
        command = [
            *REALTIME,
            "nsenter",
            f"--net=/proc/{pid}/ns/net",
            sys.executable,
            "-m",
            "spd_calib",
            *map(str, words),
        ]
        ranks.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    said = [rank.communicate()[1] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        sys.exit(f"a rank failed: {said[0][-2000:]}")
    return read(Hardware, out)


def plans_for_all(folder: Path) -> dict[str, Path]:
    """Write a profile of the demo model at TP 2 and the plans that do not depend on the link; return their files."""
    profile = folder / "profile.json"
    text = ["--data", "demo", "--tp", "2", "--seq-len", "64", "--min-len", "32", "--max-samples", "32"]
    spd("profile", "demo", *text, "--verify-samples", "16", "-o", profile)
    asked = {
        "8 bits": ["--drop", "0", "--sync-bits", "8"],
        "replicated": ["--drop", "100%", "--replicate", "100%"],
        EVERY: ["--drop", "100%"],
    }
    files = {name: folder / f"{name.replace(' ', '_')}.json" for name in asked}
    for name, words in asked.items():
        spd("plan", profile, *words, "-o", files[name])
    return files


def spd(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "spd_calib", *map(str, words), "--device", "cpu"], check=True, cwd=ROOT,
                   stderr=subprocess.DEVNULL)  # fmt: skip


def chosen_for(hardware: Path, profile: Path, model: LatencyModel, folder: Path) -> dict[str, Path]:
    """Return the planner's plans for a link: as fast, in this phase, as every sync at 8 bits, and as every attention
    dropped."""
    syncs, phase = 2 * model.blocks, model.step.phase
    found = {}
    for like, saving in (("8 bits", model.saved(0, {8: syncs})), (EVERY, model.saved(model.blocks))):
        if saving <= 0:
            continue
        name = f"planner, {phase}: as fast as {like}"
        try:
            plan = spd_calib.plan(
                profile,
                min_speedup=saving,
                sync_bits="any",
                latency=spd_calib.LatencyOptions(str(hardware), phase=phase),
                run=spd_calib.RunOptions(device="cpu"),
            )
        except (InputError, SpdError) as e:
            print(f"{name}: {e}", file=sys.stderr)
            continue
        found[name] = folder / f"{name.replace(' ', '_')}.json"
        write_text(found[name], dumps(plan))
    return found


def model_of(hardware: Hardware, sizes: ModelSizes, *, phase: Phase, plan: Plan) -> LatencyModel | str:
    """Return the latency model of a phase for a plan, or why there is none."""
    try:
        return as_measured(hardware, sizes, phase=phase, name="hardware.json", added=added_by(plan, sizes))
    except InputError as e:
        return str(e)


def rows_of(name: str, file: Path, hardware: Hardware, sizes: ModelSizes, link: str) -> list[dict[str, Any]]:
    """Return a row for each phase: the plan's step as modelled and as measured, in ms."""
    plan, rows = read(Plan, file), []
    for phase in PHASES:
        model = model_of(hardware, sizes, phase=phase, plan=plan)
        steps = {s.blocks: s.seconds for s in hardware.steps if s.phase == phase}
        row = {"link": link, "phase": phase, "plan": name, "kl": plan.verified.kl, "dropped": len(plan.drops),
               "quantised": plan.drops.counted_bits}  # fmt: skip
        measured = {k: 1e3 * getattr(steps["plan"], k) for k in ("median", "p10", "p90")}
        row |= {"dense_ms": 1e3 * steps["dense"].median, "measured_ms": measured}
        if isinstance(model, str):
            row["refused"] = model
        else:
            predicted, seen = held_against(hardware, model)["plan"]
            row |= {
                "modelled_ms": 1e3 * predicted,
                "error": predicted / seen - 1,
                "all_reduce_ms": 1e3 * model.all_reduce,
            }
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "latency" / "limited_link.json")
    args = parser.parse_args()
    sizes, rows, load = ModelSizes.of(AutoModelForCausalLM.from_pretrained(model_dir())), [], os.getloadavg()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files = plans_for_all(folder)
        for link, rate in RATES.items():
            with limited_link(rate) as pids:
                own, waiting, first = dict(files), list(files), None
                while waiting:
                    name = waiting.pop(0)
                    out = folder / f"{rate}-{len(rows)}.json"
                    hardware = bench(own[name], out, pids, args.rounds)
                    rows += rows_of(name, own[name], hardware, sizes, link)
                    if first is None:
                        first = out
                        for phase in PHASES:
                            model = model_of(hardware, sizes, phase=phase, plan=read(Plan, own[name]))
                            if isinstance(model, LatencyModel):
                                more = chosen_for(first, folder / "profile.json", model, folder)
                                own, waiting = own | more, waiting + list(more)
    document = {
        "command": f"python benchmarks/limited_link.py --rounds {args.rounds}", "versions": versions(), "ranks": 2,
        "batch": BATCH, "tokens": TOKENS, "cores": os.cpu_count(), "load_before": load, "load_after": os.getloadavg(),
        "rows": rows,
    }  # fmt: skip
    args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
