"""Joining the process group of the real ranks that torchrun starts, and ending together.

Where one rank fails, torchrun ends those of its machine, and a thread in each rank ends those of other machines. Only
the first rank to fail prints its message: what the others run into is a consequence of it.
"""

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from spd_calib.errors import InputError
from spd_calib.ranks import rank, world_size

from .comm import DistributedComm

WAIT = timedelta(hours=24)  # for work that one rank does for all; a rank that fails is noticed by other means
_store: dist.Store | None = None
T = TypeVar("T")


def start(tp: int | None) -> DistributedComm:
    """Join the process group, unless this process has joined it, and return the communication over it.

    The group's processes are the `tp` ranks of a model; with None each of them holds a whole model. They talk by gloo
    between CPUs and NCCL between GPUs, ranks that have to share a GPU by gloo there, too. Raises InputError where
    torchrun started another number of ranks than `tp`.
    """
    if tp not in (None, world_size()):
        raise InputError(
            f"torchrun started {world_size()} ranks, but TP is {tp}; run it with --nproc-per-node {tp}, or without "
            "torchrun to simulate the ranks."
        )
    if not dist.is_initialized():
        if local_size() == tp and sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on this machine, so is the traffic
        gpus = torch.cuda.device_count()
        if gpus:
            torch.cuda.set_device(_local_rank() % gpus)
        backends = f"cpu:gloo,cuda:{backend('cuda')}" if gpus else "gloo"
        dist.init_process_group(backends, store=_rendezvous(), rank=rank(), world_size=world_size(), timeout=WAIT)
        _watch_the_others()
    return DistributedComm()


def local_size() -> int:
    """Return the number of ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def backend(device: str) -> Literal["gloo", "nccl"]:
    """Return the library that all-reduces tensors on this device."""
    return "nccl" if device.startswith("cuda") and local_size() <= torch.cuda.device_count() else "gloo"


def local_device(device: str) -> str:
    """Return the device of this rank: for `cuda` a GPU of its own, by number; else `device` itself.

    Raises InputError for a GPU that is given by number: all ranks would share it.
    """
    if not device.startswith("cuda") or not torch.cuda.device_count():
        return device
    if device != "cuda":
        raise InputError(f"Under torchrun each rank takes a GPU of its own; give `device` cuda, not {device}.")
    return f"cuda:{_local_rank() % torch.cuda.device_count()}"


def from_main_rank(value: T) -> T:
    """Return the main rank's `value` on every rank; what the other ranks give is ignored.

    All ranks call this at once; the value must be one that pickle takes.
    """
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def from_all_ranks(value: T) -> list[T]:
    """Return every rank's `value`, in the order of ranks, on every rank; all call this at once."""
    if world_size() == 1:
        return [value]
    everyone: list[Any] = [None] * world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def speak_once(message: str) -> None:
    """Print `message` on stderr if no other rank has failed before; else wait until that one has printed its own."""
    try:
        store = dist.PrefixStore("spd_calib", _rendezvous(timedelta(seconds=5)))
        first = store.add("failures", 1) == 1
    except Exception:  # nobody is left to agree with
        store, first = None, True
        time.sleep(2)  # where torchrun is gone, ending.py says so and ends this process meanwhile
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
    """Return the key-value store that torchrun keeps for its ranks."""
    global _store
    if _store is None:
        _store = next(rendezvous("env://", timeout=timeout))[0]
    return _store


def _wait_until(done: Callable[[], bool], *, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not done() and time.monotonic() < end:
        time.sleep(0.05)


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", rank()))
