"""Real ranks without torchrun: this process and forks of it."""

import os
import traceback
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist


def in_two_processes(port_file: Path, work: Callable[[int], None]) -> None:
    """Run `work(rank)` as rank 0 of a gloo group in this process, and as rank 1 in a fork of it."""
    in_processes(2, port_file, work)


def in_processes(ranks: int, port_file: Path, work: Callable[[int], None]) -> None:
    """Run `work(rank)` as rank 0 of a gloo group in this process, and as each other rank in a fork of it."""
    rank, children = 0, []
    for other in range(1, ranks):
        child = os.fork()
        if not child:
            rank = other
            break
        children.append(child)
    code = 1
    try:
        dist.init_process_group("gloo", store=dist.FileStore(str(port_file), ranks), rank=rank, world_size=ranks)
        dist.barrier()  # a rank that ends at once must not end while another still connects
        work(rank)
        code = 0
    except BaseException:
        if not rank:
            raise
        traceback.print_exc()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        if rank:
            os._exit(code)
        ended = [os.waitpid(child, 0)[1] for child in children]
    assert all(os.waitstatus_to_exitcode(one) == 0 for one in ended)
