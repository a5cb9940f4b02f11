"""What dropping sync points saves where a sync costs a delay: decoding over a link, TP 2.

    sudo .venv/bin/python benchmarks/link.py        writes results/latency/link.json and link.png (some minutes)

Two ranks on gloo, one thread each, a random Llama of 8 blocks of width 512, one token at a time with the KV cache.
Each rank stands in a network namespace of its own; `slow_link.py` holds back every packet between them. Delays, shares
of attention sync points dropped (block_drop) and ways to sum are measured in turns, round after round, so that a
machine that grows slower does so for all; ranks and link run at real-time priority where they may, so that what else
runs there is not what is measured. Without root, `ip` or /dev/net/tun: on loopback, without a delay.
"""

import argparse
import contextlib
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from slow_link import ADDRESSES, DEVICE, MTU, Link, open_link, set_delay

FOLDER = Path(__file__).parent.parent / "results" / "latency"
DELAYS = (0.0, 0.5, 1.0, 5.0)  # ms, one way
SHARES = (0, 50, 100)  # % of the blocks' attention sync points
SUMS = ("all_reduce", "all_gather")  # how partial sums come together: gloo's all-reduce; all-gather and a local sum
FLOATS = (512, 4096, 32768)  # of one message
IN_A_ROW = 5
SHAPE = {
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 256,
}
PORT = 29611  # inside the namespaces, or on loopback


def rank_main(
    folder: Path, rank: int, address: str, control: int, rounds: int, tokens: int, delays: list[float]
) -> None:
    """One rank of two. `control` sets the link's delay; -1: there is none, or the other rank does."""
    import torch
    import torch.distributed as dist
    from transformers import LlamaConfig, LlamaForCausalLM

    from spd_calib.formats.drops import Drops, Point, Strategy
    from spd_calib.parallel.comm import GATHERED_AT_MOST, DistributedComm
    from spd_calib.parallel.model import TensorParallelLM

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    dist.init_process_group("gloo", init_method=f"tcp://{address}:{PORT}", rank=rank, world_size=2,
                            timeout=timedelta(minutes=2))  # fmt: skip
    comm = DistributedComm()
    torch.manual_seed(0)
    lm = TensorParallelLM(LlamaForCausalLM(LlamaConfig(**SHAPE)).eval(), comm)
    prompt = torch.arange(16)[None]
    ways = {"all_reduce": 0, "all_gather": GATHERED_AT_MOST}

    with contextlib.suppress(PermissionError):  # what else runs on this machine is not what is measured
        for thread in os.listdir("/proc/self/task"):
            os.sched_setscheduler(int(thread), os.SCHED_FIFO, os.sched_param(10))

    def under(delay: float) -> None:
        dist.barrier()
        if control >= 0:
            set_delay(control, delay / 1000)
        dist.barrier()

    def decode(way: str, share: int) -> tuple[list[float], list[int]]:
        """Return the seconds of each token, and its all-reduces."""
        comm.gathered_at_most = ways[way]
        dropped = {int(i * 100 / share) for i in range(lm.num_blocks * share // 100)} if share else set()
        seconds, counts = [], []
        with lm.running(Drops.of({Point(i, "attention"): Strategy.BLOCK_DROP for i in dropped})):
            out: Any = lm.model(input_ids=prompt, use_cache=True, logits_to_keep=1)
            for turn in range(tokens + 1):  # the first is to warm up
                token, before, begun = out.logits[:, -1:].argmax(-1), comm.all_reduces, time.perf_counter()
                out = lm.model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
                if turn:
                    seconds.append(time.perf_counter() - begun)
                    counts.append(comm.all_reduces - before)
        return seconds, counts

    def add_up(way: str, floats: int) -> list[float]:
        comm.gathered_at_most = 2**60 if way == "all_gather" else 0
        message = torch.ones(floats)
        comm.all_reduce([message])
        begun = time.perf_counter()
        for _ in range(IN_A_ROW):
            comm.all_reduce([message])
        return [(time.perf_counter() - begun) / IN_A_ROW]

    times: dict[tuple, list[float]] = {}
    reduces: dict[tuple, list[int]] = {}
    for turn in range(rounds):
        for delay in rotated(list(delays), turn):
            under(delay)
            if address in ADDRESSES:
                times.setdefault(("one_way", delay), []).extend(one_way(rank))
            for way, share in rotated([(way, share) for way in SUMS for share in SHARES], turn):
                seconds, counts = decode(way, share)
                times.setdefault(("decode", delay, way, share), []).extend(seconds)
                reduces.setdefault(("decode", delay, way, share), []).extend(counts)
            for way, floats in rotated([(way, floats) for way in SUMS for floats in FLOATS], turn):
                times.setdefault(("sum", delay, way, floats), []).extend(add_up(way, floats))
        if rank == 0:
            print(f"round {turn + 1} of {rounds}, load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
    under(0.0)
    found = [[list(key), values, sorted(set(reduces.get(key, [])))] for key, values in times.items()]
    (folder / f"rank_{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def one_way(rank: int, packets: int = 10) -> list[float]:
    """Return half of the time that a small datagram takes to the other rank and back; on rank 1, nothing."""
    import torch.distributed as dist

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
        end.bind((ADDRESSES[rank], PORT))
        end.settimeout(30)
        dist.barrier()
        seconds = []
        for _ in range(packets):
            if rank:
                end.sendto(*end.recvfrom(64))
                continue
            begun = time.perf_counter()
            end.sendto(b"?", (ADDRESSES[1], PORT))
            end.recv(64)
            seconds.append((time.perf_counter() - begun) / 2)
        return seconds


def rotated(items: list, turn: int) -> list:
    """Return the items in an order that puts each of them first in its turn."""
    start = turn % len(items)
    return items[start:] + items[:start]


def run_ranks(link: Link | None, rounds: int, tokens: int, delays: list[float]) -> list[dict]:
    """Run both ranks to their end; return one row a cell."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(2):
            control = link.control if link and rank == 0 else -1
            address = ADDRESSES[0] if link else "127.0.0.1"
            command = [f"--net={link.namespaces[rank]}"] if link else []
            command = [*(["nsenter", *command] if link else []), sys.executable, __file__, "--rank", str(rank)]
            command += ["--folder", folder, "--address", address, "--control", str(control)]
            command += ["--rounds", str(rounds), "--tokens", str(tokens), "--delays", *map(str, delays)]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": DEVICE if link else "lo"}
            environment["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # not that the addresses have no names
            ranks.append(subprocess.Popen(command, env=environment, pass_fds=[control] if control >= 0 else []))
        try:
            while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
                time.sleep(0.2)
            if any(rank.poll() for rank in ranks):
                sys.exit("a rank failed")
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        both = [json.loads(Path(folder, f"rank_{rank}.json").read_text()) for rank in range(2)]
    return [row(*mine, other) for mine, (_, other, _) in zip(*both, strict=True)]


def row(key: list, mine: list[float], reduces: list[int], other: list[float]) -> dict:
    """Return one cell, in ms: of the two ranks the slower in each measurement."""
    slower = [1000 * max(pair) for pair in zip(mine, other, strict=True)] if other else [1000 * s for s in mine]
    tenths = statistics.quantiles(slower * 2 if len(slower) == 1 else slower, n=10, method="inclusive")
    numbers = {"median": statistics.median(slower), "p10": tenths[0], "p90": tenths[-1], "repeats": len(slower)}
    what, delay, *rest = key
    named = dict(zip({"decode": ("sum", "dropped"), "sum": ("sum", "floats"), "one_way": ()}[what], rest, strict=True))
    return {"what": what, "delay": delay, **named, **numbers, **({"all_reduces": reduces} if reduces else {})}


def table(rows: list[dict]) -> str:
    """Return both tables in Markdown: decoding, and the sums alone."""
    at = {(r["what"], r["delay"], r.get("sum"), r.get("dropped", r.get("floats"))): r for r in rows}
    delays = sorted({r["delay"] for r in rows})

    def shown(*key: Any) -> str:
        digits = 1 if key[0] == "decode" else 2
        return "{0:.{3}f} ({1:.{3}f}–{2:.{3}f})".format(*(at[key][k] for k in ("median", "p10", "p90")), digits)

    lines = [
        "ms a token: median (p10–p90)",
        "",
        "| one-way delay, ms | sums by | all syncs | 50 % dropped | 100 % dropped | saved at 100 % |",
        "|---|---|---|---|---|---|",
    ]
    for delay in delays:
        for way in SUMS:
            full, none = at["decode", delay, way, 0]["median"], at["decode", delay, way, 100]["median"]
            cells = [shown("decode", delay, way, share) for share in SHARES]
            lines.append(f"| {delay:g} | {way} | {' | '.join(cells)} | {1 - none / full:.0%} |")
    counts = {share: at["decode", delays[0], SUMS[0], share]["all_reduces"] for share in SHARES}
    lines += ["", f"all-reduces a token and rank, by share dropped: {counts}", ""]
    lines += [
        "ms a sum: median (p10–p90)",
        "",
        f"| one-way delay, ms | sums by | {' | '.join(map(str, FLOATS))} floats |",
    ]
    lines.append("|---|---|" + "---|" * len(FLOATS))
    for delay in delays:
        for way in SUMS:
            cells = " | ".join(shown("sum", delay, way, floats) for floats in FLOATS)
            lines.append(f"| {delay:g} | {way} | {cells} |")
    one_ways = [f"{r['delay']:g}: {r['median']:.2f}" for r in rows if r["what"] == "one_way"]
    if one_ways:
        lines += ["", f"one-way delay set: measured, ms: {'; '.join(one_ways)}"]
    return "\n".join(lines)


def draw(rows: list[dict], path: Path) -> None:
    """Time a token against the delay, a line a share, a panel a way to sum."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    for ax, way in zip(axes, SUMS, strict=True):
        for share, colour in zip(SHARES, ("#0072B2", "#E69F00", "#009E73"), strict=True):
            cells = sorted(
                (r for r in rows if r["what"] == "decode" and r["sum"] == way and r["dropped"] == share),
                key=lambda r: r["delay"],
            )
            medians = [r["median"] for r in cells]
            low, high = [r["median"] - r["p10"] for r in cells], [r["p90"] - r["median"] for r in cells]
            ax.errorbar([r["delay"] for r in cells], medians, [low, high], color=colour, marker="o", ms=4, capsize=3,
                        label=f"{share} % of attention syncs dropped")  # fmt: skip
        ax.set(xlabel="one-way delay, ms", ylim=(0, None))
        ax.set_title({"all_reduce": "gloo's all-reduce", "all_gather": "all-gather and a local sum"}[way])
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("ms a token: median, p10 to p90")
    axes[0].legend(frameon=False, fontsize="small")
    fig.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=4, help="tokens a measurement")
    parser.add_argument("--delays", type=float, nargs="+", default=list(DELAYS), help="one way, ms")
    parser.add_argument("--out", type=Path, default=FOLDER)
    for name, kind in {"rank": int, "folder": Path, "address": str, "control": int}.items():
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)  # of a rank
    a = parser.parse_args()
    if a.rank is not None:
        return rank_main(a.folder, a.rank, a.address, a.control, a.rounds, a.tokens, a.delays)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # so that the ranks and the link end, too
    link = open_link()
    if isinstance(link, str):
        print(f"{link}: on loopback, without a delay", file=sys.stderr)
    begun, load = time.time(), os.getloadavg()
    try:
        real = None if isinstance(link, str) else link
        rows = run_ranks(real, a.rounds, a.tokens, a.delays if real else [0.0])
    finally:
        if not isinstance(link, str):
            link.close()
    document = {
        "link": {"device": "tun", "mtu": MTU, "realtime": real.realtime} if real else {"device": "lo", "why": link},
        "unit": "ms", "ranks": 2, "shape": SHAPE, "rounds": a.rounds, "tokens": a.tokens, "cores": os.cpu_count(),
        "machine": platform.machine(), "load_before": load, "load_after": os.getloadavg(),
        "seconds": round(time.time() - begun), "rows": rows,
    }  # fmt: skip
    a.out.mkdir(parents=True, exist_ok=True)
    (a.out / "link.json").write_text(json.dumps(document, indent=1) + "\n")
    draw(rows, a.out / "link.png")
    print(table(rows))
    return None


if __name__ == "__main__":
    main()
