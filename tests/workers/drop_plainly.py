"""A runtime that drops a sync point the plain way where the plan says block_drop."""

from spd_calib.formats.drops import Drops, Point, Strategy
from spd_calib.runtimes.torchrun import worker

load = worker.load_plan_by_phase


def plain(path, *, ranks):
    plan, drops = load(path, ranks=ranks)
    at_attention = [b for b in plan.blocks if b.strategy == Strategy.BLOCK_DROP]
    points = [Point(b.index, "attention") for b in at_attention]
    return plan, drops.map(lambda d: d | Drops.of(dict.fromkeys(points, Strategy.PLAIN_DROP)))


worker.load_plan_by_phase = plain

if __name__ == "__main__":
    worker.main()
