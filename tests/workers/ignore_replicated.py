"""A runtime that drops what the plan says, but replicates no heads."""

from dataclasses import replace

from spd_calib.formats.drops import Drops
from spd_calib.runtimes.torchrun import worker

load = worker.load_plan_by_phase


def otherwise(path, *, ranks):
    plan, drops = load(path, ranks=ranks)
    return plan, drops.map(lambda d: Drops({p: replace(drop, replicated=None) for p, drop in d.by_point.items()}))


worker.load_plan_by_phase = otherwise

if __name__ == "__main__":
    worker.main()
