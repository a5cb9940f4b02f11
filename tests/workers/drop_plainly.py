"""A runtime that drops a sync point the plain way where the plan says block_drop."""

from spd_calib.formats.drops import Drops, Strategy
from spd_calib.runtimes.torchrun import worker

load_plan = worker.load_plan


def plain(path, *, ranks):
    plan, drops = load_plan(path, ranks=ranks)
    at_attention = [p for p in drops if p.sync_point == "attention" and drops.strategy(p) == Strategy.BLOCK_DROP]
    return plan, drops | Drops.of(dict.fromkeys(at_attention, Strategy.PLAIN_DROP))


worker.load_plan = plain

if __name__ == "__main__":
    worker.main()
