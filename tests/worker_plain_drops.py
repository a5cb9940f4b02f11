"""A runtime that drops a sync point the plain way where the plan says block_drop."""

from spd_calib.formats.common import Strategy
from spd_calib.runtimes.torchrun import worker


def set_plan(lm, plan, path) -> None:
    plain = [Strategy.PLAIN_DROP if s == Strategy.BLOCK_DROP else s for s in plan.strategies]
    lm.set_strategies(plain, plan.mlp_strategies)


worker.set_plan = set_plan

if __name__ == "__main__":
    worker.main()
