"""What torchrun runs of a command: MODULE given first, ending with torchrun from the first moment on."""

import runpy
import sys

from spd_calib.parallel.ending import ending_together

if __name__ == "__main__":
    del sys.argv[0]
    with ending_together():
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
