"""A runtime that quantises every sync of the plan."""

from spd_calib.formats.drops import SUBLAYERS, Drops, Point
from spd_calib.runtimes.torchrun import worker

load = worker.load_plan_by_phase


def otherwise(path, *, ranks):
    plan, drops = load(path, ranks=ranks)
    kept = [Point(b, kind) for b in range(plan.model.num_blocks) for kind in SUBLAYERS]
    return plan, drops.map(lambda d: Drops.of_bits(dict.fromkeys(kept, 8)) | d)


worker.load_plan_by_phase = otherwise

if __name__ == "__main__":
    worker.main()
