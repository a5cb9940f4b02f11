"""A runtime that sends every message in full, whatever the plan says."""

from spd_calib.runtimes.torchrun import worker

load = worker.load_plan_by_phase


def otherwise(path, *, ranks):
    plan, drops = load(path, ranks=ranks)
    return plan, drops.map(lambda d: d.only(d))


worker.load_plan_by_phase = otherwise

if __name__ == "__main__":
    worker.main()
