"""A runtime that drops what the plan says, but ignores its predictors."""

from spd_calib.runtimes.torchrun import worker

load = worker.load_plan_by_phase


def without_predictors(path, *, ranks):
    plan, _ = load(path, ranks=ranks)
    return plan, plan.by_phase


worker.load_plan_by_phase = without_predictors

if __name__ == "__main__":
    worker.main()
