"""Making sure that all ranks of a tensor-parallel group run the same plan, before any of them runs it.

One that keeps a sync point which the others drop would pair its sums with the wrong ones, and nothing would look wrong
but the text.
"""

from datetime import timedelta
from typing import Any

import torch.distributed as dist

from spd_calib.errors import InputError

WAIT = timedelta(minutes=10)  # for the slowest node to load its share of the weights


def check_agreement(
    group: Any, *, applied: str | None, error: str | None, needs: str = "", wait: timedelta = WAIT
) -> None:
    """Return once every rank of a gloo `group` has said that it applied the same plan.

    `applied`: the digest of what this rank applied, or None and `error` says why it could not. `needs`: what a node
    must have to apply one, for the sentence that says that some did not. Raises InputError, on every rank that is
    there, where one could not, applied another, or is not there within `wait`.
    """
    size, outcome = dist.get_world_size(group), (applied, error)
    outcomes: list[Any] = [outcome]
    if size > 1:
        try:
            dist.monitored_barrier(group, timeout=wait, wait_all_ranks=True)
        except RuntimeError as e:
            raise InputError(
                error
                or f"Not every rank of the tensor-parallel group has applied a plan within {wait}: each node needs "
                f"{needs or 'the same plan'}."
            ) from e
        outcomes = [None] * size
        dist.all_gather_object(outcomes, outcome, group=group)
    if errors := [f"rank {rank}: {e}" if size > 1 else e for rank, (_, e) in enumerate(outcomes) if e]:
        raise InputError(error or errors[0])
    if len(digests := {digest for digest, _ in outcomes}) > 1:
        raise InputError(
            f"The ranks of the tensor-parallel group were given {len(digests)} different plans ("
            f"{', '.join(digest[:12] for digest, _ in outcomes)} on ranks 0 to {size - 1}); "
            "start every node with the same one."
        )
