"""Real ranks: joining the process group that torchrun starts, and ending together.

Where one rank fails, torchrun ends those of its machine; a thread ends those of other machines. Of all messages
only the first is printed: what the others see is its consequence.
"""

import atexit
import os
import sys
import threading
import time
from datetime import timedelta
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from spd_calib.errors import InputError
from spd_calib.ranks import rank, world_size

from .comm import Distributed

WAIT = timedelta(hours=24)  # for work that one rank does for all; of a rank that fails the others hear otherwise
_store: dist.Store | None = None
T = TypeVar("T")


def start(tp: int | None) -> Distributed:
    """Join the process group, unless this process has; its ranks are the `tp` ranks of a model, or with None replicas.

    gloo between CPUs and NCCL between GPUs; ranks that have to share a GPU use gloo there, too. Raises InputError
    where torchrun started another number of ranks than `tp`.
    """
    if tp not in (None, world_size()):
        raise InputError(
            f"torchrun started {world_size()} ranks, but TP is {tp}; run it with --nproc-per-node {tp}, or without "
            "torchrun to simulate the ranks."
        )
    if not dist.is_initialized():
        if local_size() == tp and sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all on one machine: nobody else need hear
        gpus = torch.cuda.device_count()
        if gpus:
            torch.cuda.set_device(_local_rank() % gpus)
        backends = f"cpu:gloo,cuda:{backend('cuda')}" if gpus else "gloo"
        dist.init_process_group(backends, store=_rendezvous(), rank=rank(), world_size=world_size(), timeout=WAIT)
        _watch_the_others()
    return Distributed()


def local_size() -> int:
    """Ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def backend(device: str) -> Literal["gloo", "nccl"]:
    """What carries the sums of tensors on this device."""
    return "nccl" if device.startswith("cuda") and local_size() <= torch.cuda.device_count() else "gloo"


def local_device(device: str) -> str:
    """The device of this rank: `cuda` is the GPU of its own. Raises InputError for a GPU by number."""
    if not device.startswith("cuda") or not torch.cuda.device_count():
        return device
    if device != "cuda":
        raise InputError(f"Under torchrun each rank takes a GPU of its own; give --device cuda, not {device}.")
    return f"cuda:{_local_rank() % torch.cuda.device_count()}"


def from_main_rank(value: T) -> T:
    """The main rank's `value`, on every rank: what another one gives is not looked at."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def speak_once(message: str) -> None:
    """Print `message` on stderr if no other rank has failed before; else wait until that one has spoken."""
    try:
        store = dist.PrefixStore("spd_calib", _rendezvous(timedelta(seconds=5)))
        first = store.add("failures", 1) == 1
    except Exception:  # nobody is left to agree with
        store, first = None, True
        time.sleep(2)  # where torchrun is gone, ranks.py says so and ends this process meanwhile
    if first:
        print(message, file=sys.__stderr__, flush=True)
    if store is not None and first:
        store.set("spoken", "yes")
    elif store is not None:
        _wait_until(lambda: store.check(["spoken"]), seconds=5)


def _watch_the_others() -> None:
    """Start a thread that ends this process when another rank has failed; it stops when this one is done."""
    done = threading.Event()
    store = dist.PrefixStore("spd_calib", _rendezvous())

    def watch() -> None:
        while not done.wait(1):
            try:
                failed = store.check(["spoken"])
            except Exception:  # torchrun itself is gone, and with it the store
                failed = True
            if failed and not done.is_set():
                os._exit(1)

    thread = threading.Thread(target=watch, daemon=True)

    def stop() -> None:
        done.set()
        thread.join(5)  # a thread still in C++ when Python ends would abort it
        dist.destroy_process_group()

    atexit.register(stop)
    thread.start()


def _rendezvous(timeout: timedelta = timedelta(minutes=5)) -> dist.Store:
    """The key-value store that torchrun keeps for its ranks."""
    global _store
    if _store is None:
        _store = next(rendezvous("env://", timeout=timeout))[0]
    return _store


def _wait_until(done, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not done() and time.monotonic() < end:
        time.sleep(0.05)


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", rank()))
