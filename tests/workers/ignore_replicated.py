"""A runtime that drops what the plan says, but replicates no heads."""

from dataclasses import replace

from spd_calib.formats.drops import Drops
from spd_calib.runtimes.torchrun import worker

load_plan = worker.load_plan


def otherwise(path, *, ranks):
    plan, drops = load_plan(path, ranks=ranks)
    return plan, Drops({point: replace(drop, replicated=None) for point, drop in drops.by_point.items()})


worker.load_plan = otherwise

if __name__ == "__main__":
    worker.main()
