"""A runtime that quantises every sync of the plan."""

from spd_calib.formats.drops import SUBLAYERS, Drops, Point
from spd_calib.runtimes.torchrun import worker

load_plan = worker.load_plan


def otherwise(path, *, ranks):
    plan, drops = load_plan(path, ranks=ranks)
    kept = [Point(b, kind) for b in range(plan.model.num_blocks) for kind in SUBLAYERS]
    return plan, Drops.of_bits(dict.fromkeys(kept, 8)) | drops


worker.load_plan = otherwise

if __name__ == "__main__":
    worker.main()
