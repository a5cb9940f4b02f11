"""The paper's three classes of blocks, by KL; and when a candidate's class is certain enough to measure no further."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from scipy import stats

from spd_calib.errors import InputError
from spd_calib.formats.common import Tier
from spd_calib.formats.profile import Comparison

from .metrics import Tally
from .predictions import FIELDS
from .standard_error import ratio_and_stderr

SHARES_OF_MEAN = (1 / 4, 1.0)  # the thresholds between the tiers, of the blocks' mean KL
MIN_BATCHES, MIN_SEQUENCES = 4, 16  # before anything is decided


def tiers(kl: Mapping[int, float], tau1: float | None = None, tau2: float | None = None) -> dict[int, Tier]:
    """Return each block's tier from what dropping it alone costs (`kl`, nats per token, by block); see `thresholds`."""
    low, high = thresholds(kl, tau1, tau2)
    return {
        b: "insensitive" if value <= low else "sensitive" if value <= high else "extremely sensitive"
        for b, value in kl.items()
    }


def thresholds(kl: Mapping[int, float], tau1: float | None, tau2: float | None) -> tuple[float, float]:
    """Return the KL up to which a block is insensitive, and the one up to which it is sensitive.

    They are tau1 and tau2 where given, else a quarter of the blocks' mean KL and the mean. Raises InputError where they
    are not in order.
    """
    mean = sum(kl.values()) / max(len(kl), 1)
    low = SHARES_OF_MEAN[0] * mean if tau1 is None else tau1
    high = max(SHARES_OF_MEAN[1] * mean, low) if tau2 is None else tau2
    if not 0 <= low <= high:
        raise InputError(f"The thresholds {low} and {high} are not in order; the first is at most the second, from 0.")
    return low, high


@dataclass(frozen=True)
class Stopping:
    """Decides when a candidate has been measured on enough batches to be certain of its tier.

    Certain means: with probability `confidence`, the tiers of all candidates of a group are those that all `sequences`
    would give. A group is a list of candidates, by number, that share the default thresholds (tiers.thresholds).

    A candidate is decided when the confidence interval of (its KL - threshold) excludes 0 for both thresholds. The
    difference is taken sequence by sequence, since a hard sequence is hard for all candidates. Candidates that have
    stopped already enter the threshold with the mean and the error they had then; their errors are added up. The
    interval is Student's t over sequences, narrowed by sqrt(1 - n / sequences), since only the remaining sequences are
    unknown, and corrected (Bonferroni) for the number of candidates of the group and of batches after which it is
    looked at. It takes for granted that the sequences stand in no particular order.

    A candidate that is still near a threshold at the end of the text needs that threshold to be exact; `wanting` names
    the stopped candidates whose measurements must be completed for it.
    """

    groups: Sequence[Sequence[int]]
    confidence: float
    sequences: int

    def decided(self, tallies: Sequence[Tally], active: set[int], batch: int, batches: int) -> set[int]:
        """Return those of `active` that need no more batches, after batch number `batch` (from 1) of `batches`."""
        if batch < MIN_BATCHES or batch == batches:
            return set()
        return {i for group in self.groups for i in self._decided_of(tallies, active, group, batches)}

    def wanting(self, tallies: Sequence[Tally], batches: int) -> set[int]:
        """Return the stopped candidates that must be measured to the end of the text, where the others are by now."""
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
            mean, stderr = ratio_and_stderr((kl - share * kl.sum(0)).T, tokens)
            assert stderr is not None  # of MIN_SEQUENCES
            stderr *= self._unknown(n)
            clear &= (mean - share * known).abs() > t * (stderr + share * doubt)
        return [i for i, sure in zip(running, clear.tolist(), strict=True) if sure]

    def _doubt(self, stopped: Comparison) -> float:
        """Return the standard error of a KL as a statement on all `sequences`."""
        assert stopped.kl_stderr is not None  # it takes MIN_SEQUENCES to stop
        return stopped.kl_stderr * self._unknown(stopped.sequences)

    def _unknown(self, n: int) -> float:
        return math.sqrt(1 - n / self.sequences)
