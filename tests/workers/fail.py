"""Two ranks that reduce in lockstep until one of them fails, in the way named."""

import os
import signal
import sys
import time

from spd_calib.errors import InputError, SpdError
from spd_calib.parallel.ending import ending_together
from spd_calib.ranks import rank

with ending_together():
    import torch

    from spd_calib.parallel import distributed

    comm = distributed.start(int(os.environ["WORLD_SIZE"]))
    for step in range(2000):
        comm.all_reduce([torch.ones(4)])
        time.sleep(0.01)
        if step == 20:
            print(f"rank {rank()} at {time.time()}", file=sys.__stderr__, flush=True)
            if sys.argv[1] == "all":
                raise InputError("Every rank found the same fault.")
            if sys.argv[1] == "raise" and rank() == 1:
                raise SpdError("Rank 1 cannot go on.")
            if sys.argv[1] == "killed" and rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
