"""Measuring plans: each is run as a whole against the dense model, on the same tokens.

Profiling one block, the paper's cumulative order and verifying a finished plan are all this one act, on different
lists of experiments.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from spd_calib.formats.common import Strategy
from spd_calib.formats.profile import Baseline, Comparison, Point, SyncPoint
from spd_calib.parallel.model import Recording, TensorParallelLM

from .journal import Journal, once
from .metrics import Tally, token_metrics

LOGITS_AT_A_TIME = 2**24  # float32 logits compared at once: 64 MiB a tensor
Tick = Callable[[int, Tally | None], None]  # (experiment, its tally so far), after each batch


@dataclass(frozen=True)
class Experiment:
    """Strategies of every block's attention and MLP sync point."""

    attention: tuple[Strategy, ...]
    mlp: tuple[Strategy, ...]

    @classmethod
    def dropping(cls, blocks: Sequence[int], strategy: Strategy, num_blocks: int) -> "Experiment":
        """Drop the attention's sync point in `blocks`, keep every other."""
        keep = Strategy.KEEP_SYNC
        return cls(tuple(strategy if i in blocks else keep for i in range(num_blocks)), (keep,) * num_blocks)

    @classmethod
    def of(cls, drops: Mapping[Point, Strategy], num_blocks: int) -> "Experiment":
        """Drop the sync points named, each in its way, keep every other."""

        def strategies(kind: SyncPoint) -> tuple[Strategy, ...]:
            points = [Point(block=i, sync_point=kind) for i in range(num_blocks)]
            return tuple(drops.get(point, Strategy.KEEP_SYNC) for point in points)

        return cls(strategies("attention"), strategies("mlp"))

    @property
    def first(self) -> int:
        """The first block that differs from the dense model: before it, nothing need be run again."""
        pairs = zip(self.attention, self.mlp, strict=True)
        keep = Strategy.KEEP_SYNC
        return next((i for i, pair in enumerate(pairs) if pair != (keep, keep)), len(self.attention))


def measure(
    lm: TensorParallelLM,
    sequences: Sequence[Sequence[int]],
    experiments: Sequence[Experiment],
    batch_size: int = 8,
    tick: Tick = lambda experiment, tally: None,
    journal: Journal | None = None,
) -> tuple[Baseline, list[Comparison]]:
    """The dense model and every experiment on `sequences` of token ids; results in the order of `experiments`.

    One batch's hidden states are held at a time: each experiment starts from those that enter its first dropped
    block. `tick` is called after each batch of each experiment. What `journal` holds is not measured again.
    Leaves every sync point kept.
    """
    dense, tallies = Tally(), [Tally() for _ in experiments]
    for number, (input_ids, lengths) in enumerate(batches(sequences, batch_size, lm.device)):
        batch = _Batch(lm, input_ids, lengths)
        dense.add(Tally.of_state(once(journal, (number, "dense"), batch.dense)))
        for i, (experiment, tally) in enumerate(zip(experiments, tallies, strict=True)):
            tally.add(Tally.of_state(once(journal, (number, i), partial(batch.planned, experiment))))
            tick(i, tally)
    return dense.baseline(), [tally.comparison() for tally in tallies]


class _Batch:
    """One batch on the dense model, recorded when something is first measured on it."""

    def __init__(self, lm: TensorParallelLM, input_ids: Tensor, lengths: list[int]):
        self.lm, self.input_ids, self.lengths = lm, input_ids, lengths

    @cached_property
    def recording(self) -> Recording:
        self.lm.keep_all()
        return self.lm.record(self.input_ids)

    def dense(self) -> dict:
        tally, final = Tally(), self.recording.final
        compare(self.lm, final, final, False, self.input_ids, self.lengths, tally)
        return tally.state()

    def planned(self, experiment: Experiment) -> dict:
        """Leaves every sync point kept."""
        lm, tally, final = self.lm, Tally(), self.recording.final
        if experiment.first < lm.num_blocks:
            lm.set_strategies(experiment.attention, experiment.mlp)
            final = lm.resume(self.recording, experiment.first)
        compare(lm, self.recording.final, final, lm.head.streams_differ, self.input_ids, self.lengths, tally)
        lm.keep_all()
        return tally.state()


def batches(sequences: Sequence[Sequence[int]], size: int, device: torch.device) -> Iterator[tuple[Tensor, list[int]]]:
    """Token ids [B, T], padded on the right (no real token of a causal model ever sees that), and their lengths."""
    for start in range(0, len(sequences), size):
        rows = [torch.tensor(s) for s in sequences[start : start + size]]
        yield torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device), [len(r) for r in rows]


def compare(
    lm: TensorParallelLM,
    dense: Tensor,
    planned: Tensor,
    streams_differ: bool,
    input_ids: Tensor,
    lengths: Sequence[int],
    tally: Tally,
) -> None:
    """Add one batch to `tally`: sequence by sequence, some positions at a time, from what left the final norm.

    dense [B, T, d]; planned the same, or [ranks * B, T, d] where the ranks' streams differ.
    """
    streams = planned.unflatten(0, (-1, len(lengths)))  # [1 or ranks, B, T, d]
    step = max(1, LOGITS_AT_A_TIME // lm.head.vocab_size)
    for row, length in enumerate(lengths):
        total = torch.zeros(6, dtype=torch.float64)
        for start in range(0, length - 1, step):
            positions = slice(start, min(start + step, length - 1))
            lm.head.streams_differ = False
            p = lm.logits(dense[row : row + 1, positions])[0]
            lm.head.streams_differ = streams_differ
            q = p if planned is dense else lm.logits(streams[:, row, positions])[0]
            rows, largest = token_metrics(p, q, input_ids[row, 1:][positions])
            total += rows.sum(0).cpu()
            tally.max_abs_logprob_diff = max(tally.max_abs_logprob_diff, largest)
        tally.sums.append(total)
        tally.tokens.append(length - 1)
