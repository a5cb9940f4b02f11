"""A runtime that ignores the plan it was given."""

from spd_calib.formats.drops import NOTHING_DROPPED
from spd_calib.runtimes.torchrun import worker

load_plan = worker.load_plan


def nothing(path, *, ranks):
    plan, _ = load_plan(path, ranks=ranks)
    return plan, NOTHING_DROPPED


worker.load_plan = nothing

if __name__ == "__main__":
    worker.main()
