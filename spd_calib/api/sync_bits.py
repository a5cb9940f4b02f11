"""The bits of the syncs that a plan keeps: what is asked for, and what is run."""

from spd_calib.errors import InputError
from spd_calib.formats.drops import BITS
from spd_calib.planning.budget_options import BudgetOptions
from spd_calib.planning.sync_bits import ANY_BITS


def checked_bits(
    sync_bits: int | str | None, asked: BudgetOptions, *, others: bool, by_phase: bool = False
) -> int | None:
    """Return the bits of every sync that is kept; None where none is quantised, or the planner chooses (ANY_BITS).

    `others` says whether baselines or replicated heads are asked for, `by_phase` whether a choice for each phase is,
    which has bits of its own. Raises InputError for what does not go together.
    """
    if sync_bits not in (None, ANY_BITS, *BITS):
        raise InputError(
            f"`sync_bits` {sync_bits} is none of {', '.join(map(str, BITS))}, {ANY_BITS}; leave it out for full syncs."
        )
    if sync_bits == ANY_BITS and asked.min_speedup is None and not by_phase:
        raise InputError(
            f"`sync_bits` {ANY_BITS} chooses bits for the time that they save: it needs `min_speedup`; for the bytes "
            "alone give `max_bytes` in its place."
        )
    if asked.max_bytes is not None and (sync_bits is not None or others):
        raise InputError(
            "`max_bytes` chooses the bits itself, and has no baselines or replicated heads: leave `sync_bits`, "
            "`compare`, `replicate` out."
        )
    if sync_bits == ANY_BITS and others:
        raise InputError(
            f"`sync_bits` {ANY_BITS} has no baselines or replicated heads: leave `compare`, `replicate` out."
        )
    return None if sync_bits in (None, ANY_BITS) else int(sync_bits)  # of numpy, too
