"""A runtime that drops what the plan says, but ignores its predictors."""

from spd_calib.runtimes.torchrun import worker

load_plan = worker.load_plan


def without_predictors(path, *, ranks):
    plan, _ = load_plan(path, ranks=ranks)
    return plan, plan.drops


worker.load_plan = without_predictors

if __name__ == "__main__":
    worker.main()
