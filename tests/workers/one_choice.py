"""A runtime that reads prompts by the choice of decoding, too."""

from spd_calib.formats.phases import ByPhase
from spd_calib.runtimes.torchrun import worker

load = worker.load_plan_by_phase


def otherwise(path, *, ranks):
    plan, drops = load(path, ranks=ranks)
    return plan, ByPhase.of(drops.decode)


worker.load_plan_by_phase = otherwise

if __name__ == "__main__":
    worker.main()
