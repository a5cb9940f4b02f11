"""The program that torchrun starts as each rank: it runs the MODULE given first, and ends when torchrun does."""

import runpy
import sys

from spd_calib.parallel.ending import ending_together

if __name__ == "__main__":
    del sys.argv[0]
    with ending_together():
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
