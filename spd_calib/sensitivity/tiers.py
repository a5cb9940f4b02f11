"""The paper's three classes of blocks, by KL; and when a candidate's class is certain enough to measure no further."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from scipy import stats

from spd_calib.errors import InputError
from spd_calib.formats.profile import Comparison

from .metrics import FIELDS, Tally

Tier = Literal["insensitive", "sensitive", "extremely sensitive"]
SHARES_OF_MEAN = (1 / 4, 1.0)  # the thresholds between the tiers, of the blocks' mean KL
MIN_BATCHES, MIN_SEQUENCES = 4, 16  # before anything is decided


def tiers(kl: Mapping[int, float], tau1: float | None = None, tau2: float | None = None) -> dict[int, Tier]:
    """Each block's tier by its single KL; by default the thresholds are a quarter of the blocks' mean, and the mean."""
    low, high = thresholds(kl, tau1, tau2)
    return {
        b: "insensitive" if value <= low else "sensitive" if value <= high else "extremely sensitive"
        for b, value in kl.items()
    }


def thresholds(kl: Mapping[int, float], tau1: float | None, tau2: float | None) -> tuple[float, float]:
    mean = sum(kl.values()) / max(len(kl), 1)
    low = SHARES_OF_MEAN[0] * mean if tau1 is None else tau1
    high = max(SHARES_OF_MEAN[1] * mean, low) if tau2 is None else tau2
    if not 0 <= low <= high:
        raise InputError(f"The thresholds {low} and {high} are not in order; the first is at most the second, from 0.")
    return low, high


@dataclass(frozen=True)
class Stopping:
    """When a candidate's batches so far leave no doubt of the tier that all `sequences` would give it.

    The candidates of a group, by their numbers, share the default thresholds: of each, its KL less a threshold must
    lie clear of 0. That difference is taken sequence by sequence (a hard one is hard for all candidates); what has
    stopped enters with its mean and error as they were, errors added up. The interval is Student's over sequences,
    narrowed by sqrt(1 - n / sequences) since the rest is all that is unknown, and corrected (Bonferroni) for every
    candidate of the group and every batch after which one looks: with probability `confidence` all tiers of a group
    are those of the whole run. That takes sequences in no particular order for granted. What is near a threshold at
    the end of the text calls for an exact threshold: `wanting` says whose measurement must be completed for it.
    """

    groups: Sequence[Sequence[int]]
    confidence: float
    sequences: int

    def decided(self, tallies: Sequence[Tally], active: set[int], batch: int, batches: int) -> set[int]:
        """Which of `active` need no more batches, after batch number `batch` (from 1) of `batches`."""
        if batch < MIN_BATCHES or batch == batches:
            return set()
        return {i for group in self.groups for i in self._decided_of(tallies, active, group, batches)}

    def wanting(self, tallies: Sequence[Tally], batches: int) -> set[int]:
        """At the end of the text: which of the stopped must be measured on the rest of it."""
        return {i for group in self.groups for i in self._wanting_of(tallies, group, batches)}

    def _wanting_of(self, tallies: Sequence[Tally], group: Sequence[int], batches: int) -> list[int]:
        found = {i: tallies[i].comparison() for i in group}
        doubt = {i: self._doubt(c) for i, c in found.items() if c.sequences < self.sequences}
        mean = sum(c.kl for c in found.values()) / len(group)
        distances = [
            abs(found[i].kl - share * mean) / share for share in SHARES_OF_MEAN for i in group if i not in doubt
        ]
        allowed = min(distances, default=math.inf) * len(group) / self._t(self.sequences, len(group), batches)
        wanted = []
        for i in sorted(doubt, key=doubt.__getitem__, reverse=True):
            if sum(doubt.values()) < allowed:
                break
            wanted.append(i)
            del doubt[i]
        return wanted

    def _t(self, n: int, candidates: int, batches: int) -> float:
        return float(stats.t.isf((1 - self.confidence) / (2 * max(batches - MIN_BATCHES, 1) * candidates), n - 1))

    def _decided_of(self, tallies: Sequence[Tally], active: set[int], group: Sequence[int], batches: int) -> list[int]:
        running, stopped = [i for i in group if i in active], [i for i in group if i not in active]
        if not running or len(tallies[running[0]].tokens) < MIN_SEQUENCES:
            return []
        tokens = torch.tensor(tallies[running[0]].tokens, dtype=torch.float64)
        n, column = len(tokens), FIELDS.index("kl")
        kl = torch.stack([torch.stack(tallies[i].sums)[:, column] for i in running])  # [running, sequences]
        others = [tallies[i].comparison() for i in stopped]
        known = sum(c.kl for c in others)
        doubt = sum(map(self._doubt, others))
        t = self._t(n, len(group), batches)
        clear = torch.ones(len(running), dtype=torch.bool)
        for share in SHARES_OF_MEAN:
            share /= len(group)
            above = kl - share * kl.sum(0)
            mean = above.sum(1) / tokens.sum()
            squares = (above - mean[:, None] * tokens).pow(2).sum(1)  # as Tally's error of a ratio
            stderr = (squares * n / (n - 1)).sqrt() / tokens.sum() * self._unknown(n)
            clear &= (mean - share * known).abs() > t * (stderr + share * doubt)
        return [i for i, sure in zip(running, clear.tolist(), strict=True) if sure]

    def _doubt(self, stopped: Comparison) -> float:
        """Return the standard error of a KL as a statement on all `sequences`."""
        assert stopped.kl_stderr is not None  # it takes MIN_SEQUENCES to stop
        return stopped.kl_stderr * self._unknown(stopped.sequences)

    def _unknown(self, n: int) -> float:
        return math.sqrt(1 - n / self.sequences)
