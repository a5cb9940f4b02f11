"""The place of this process among torchrun's ranks, which commands ask before anything heavy is imported."""

import os

STARTED_BY = "SPD_CALIB_STARTED_BY"  # in the environment of ranks: the id of the process that runs torchrun for them


def world_size() -> int:
    """Return the number of ranks that torchrun started; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ and "WORLD_SIZE" in os.environ else 1


def rank() -> int:
    """Return the number of this process among them; 0 without torchrun."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def is_main_rank() -> bool:
    """Say whether this is the one rank that writes files and prints."""
    return rank() == 0
