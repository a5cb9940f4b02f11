"""Measuring plans as they are served: a prompt read by one choice, the tokens behind it by another with its cache.

The prompt is the first half of each sequence, and what is measured are the tokens of the second half, of which the
first is predicted by the prompt's last one. They are run in one forward, which computes what one after the other would.
"""

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from spd_calib.errors import InputError
from spd_calib.formats.drops import NOTHING_DROPPED, Drops
from spd_calib.formats.phases import ByPhase

from .measure import Subject, Tick
from .metrics import Tally
from .reference import Reference, plans_at_a_time

FEWEST_TOKENS = 4  # of a sequence: a prompt of one token could not be told from a token that is decoded


def measure_served(
    subject: Subject,
    sequences: Sequence[Sequence[int]],
    *,
    plans: Sequence[ByPhase],
    batch_size: int = 8,
    tick: Tick | None = None,
) -> list[Tally]:
    """Compare each of `plans`, as it is served, with the dense model on the second halves of `sequences` of token ids.

    The tallies hold the sequences in one order. A plan is run with what the subject drops always. `tick` is called
    after each batch of each plan (`served_batches`). Raises InputError for a sequence of fewer than FEWEST_TOKENS
    tokens, and one that names the block where NaN or Inf first appears, if any does.
    """
    if any(len(ids) < FEWEST_TOKENS for ids in sequences):
        raise InputError(
            f"A sequence is too short to be cut into a prompt and what follows it; profile again with a min_len of "
            f"{FEWEST_TOKENS} tokens or more."
        )
    tallies = [Tally() for _ in plans]
    for batch in served_batches(sequences, batch_size):
        for i, found in _compared(subject, torch.tensor(batch, device=subject.lm.device), plans):
            tallies[i].add(found)
            if tick is not None:
                tick(i, tallies[i])
    return tallies


def served_batches(sequences: Sequence[Sequence[int]], size: int) -> list[list[Sequence[int]]]:
    """Return the sequences in batches of one length each, at most `size` of them."""
    by_length: dict[int, list[Sequence[int]]] = {}
    for ids in sequences:
        by_length.setdefault(len(ids), []).append(ids)
    return [some[start : start + size] for some in by_length.values() for start in range(0, len(some), size)]


@torch.no_grad()
def _compared(subject: Subject, ids: Tensor, plans: Sequence[ByPhase]) -> Iterator[tuple[int, Tally]]:
    """Yield the index of each plan and what it costs on the second half of token ids [B, T].

    The plans that read prompts alike follow each other: the prompt is run once for them.
    """
    lm, half = subject.lm, ids.shape[1] // 2
    with subject.dense.running(NOTHING_DROPPED):
        dense, _ = subject.dense.extend(ids)
    of_second = ids[:, half - 1 :]
    lengths = [of_second.shape[1]] * len(ids)
    reference = Reference(lm, dense[:, half - 1 :], input_ids=of_second, lengths=lengths)
    by_prefill: dict[Drops, list[int]] = {}
    for i, plan in enumerate(plans):
        by_prefill.setdefault(plan.prefill, []).append(i)
    for prefill, alike in by_prefill.items():
        with lm.running(subject.always | prefill):
            of_prompt, cache = lm.extend(ids[:, :half])
        size = plans_at_a_time(lm, len(reference.targets))
        for some in (alike[start : start + size] for start in range(0, len(alike), size)):
            streams = []
            for i in some:
                with lm.running(subject.always | plans[i].decode):
                    behind, _ = lm.extend(ids[:, half:], copy.deepcopy(cache))
                streams.append(reference.streams(_one_behind_the_other(of_prompt[:, -1:], behind, batch=len(ids))))
            for i, found in zip(some, reference.compare(streams), strict=True):
                _check_finite(found, subject, plans[i], ids)
                yield i, found


def _one_behind_the_other(first: Tensor, second: Tensor, *, batch: int) -> Tensor:
    """Return what left the final norm in two forwards, [B, T, d] or head.PerRank each, as if it had been in one.

    Where it differs from rank to rank in one of them, [ranks * B, T, d].
    """
    parts = [final.as_subclass(Tensor).unflatten(0, (-1, batch)) for final in (first, second)]
    ranks = max(map(len, parts))
    return torch.cat([part.expand(ranks, -1, -1, -1) for part in parts], 2).flatten(0, 1)


def _check_finite(tally: Tally, subject: Subject, plan: ByPhase, ids: Tensor) -> None:
    """Raise InputError where `tally` holds NaN or Inf, naming the block where a phase's choice first gives any."""
    if not tally.finite():
        for drops in (plan.prefill, plan.decode):
            with subject.lm.running(subject.always | drops):
                if not subject.lm(ids).isfinite().all() or drops is plan.decode:
                    subject.lm.refuse_nonfinite(ids)
