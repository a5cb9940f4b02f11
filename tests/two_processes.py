"""Two real ranks without torchrun: this process and a fork of it."""

import os
import traceback
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist


def in_two_processes(port_file: Path, work: Callable[[int], None]) -> None:
    """Run `work(rank)` as rank 0 of a gloo group in this process, and as rank 1 in a fork of it."""
    child = os.fork()
    rank, code = (0, 0) if child else (1, 1)
    try:
        dist.init_process_group("gloo", store=dist.FileStore(str(port_file), 2), rank=rank, world_size=2)
        work(rank)
        code = 0
    except BaseException:
        if child:
            raise
        traceback.print_exc()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        if not child:
            os._exit(code)
        ended = os.waitpid(child, 0)[1]
    assert os.waitstatus_to_exitcode(ended) == 0
