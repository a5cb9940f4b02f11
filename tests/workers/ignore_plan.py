"""A runtime that ignores the plan it was given."""

from spd_calib.formats.phases import NOTHING_DROPPED_IN_BOTH
from spd_calib.runtimes.torchrun import worker

load = worker.load_plan_by_phase


def nothing(path, *, ranks):
    plan, _ = load(path, ranks=ranks)
    return plan, NOTHING_DROPPED_IN_BOTH


worker.load_plan_by_phase = nothing

if __name__ == "__main__":
    worker.main()
