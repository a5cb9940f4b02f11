"""A runtime that replicates heads in every block of the plan, as in the one where it should."""

from dataclasses import replace

from spd_calib.formats.drops import Drops
from spd_calib.runtimes.torchrun import worker

load = worker.load_plan_by_phase


def otherwise(path, *, ranks):
    plan, drops = load(path, ranks=ranks)
    groups = next(iter(plan.drops.replicated.values()))
    return plan, drops.map(lambda d: Drops({p: replace(drop, replicated=groups) for p, drop in d.by_point.items()}))


worker.load_plan_by_phase = otherwise

if __name__ == "__main__":
    worker.main()
