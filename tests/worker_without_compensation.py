"""A runtime that drops what the plan says, but ignores its predictors."""

from spd_calib.runtimes.torchrun import worker

worker.set_plan = lambda lm, plan, path: lm.set_strategies(plan.strategies, plan.mlp_strategies)

if __name__ == "__main__":
    worker.main()
