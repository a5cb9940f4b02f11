"""Measuring plans: each is run as a whole against the dense model, on the same tokens.

Profiling one block, the paper's cumulative order and verifying a finished plan are all this one act, on different
lists of experiments.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from spd_calib.formats.common import Strategy
from spd_calib.formats.profile import Baseline, Comparison, Point, SyncPoint
from spd_calib.parallel.distributed import from_main_rank
from spd_calib.parallel.finite import refuse_not_finite
from spd_calib.parallel.model import Recording, TensorParallelLM

from .journal import Journal, OfText, once
from .metrics import Tally, log_prob_metrics
from .tiers import Stopping
from .together import at_a_time, run_together

PLAIN = Strategy.PLAIN_DROP
LOGITS_AT_A_TIME = 2**22  # float32 logits compared at once: 16 MiB a tensor
LOGITS_HELD = 2**24  # log-probabilities of the dense model held for a batch, 64 MiB; beyond that computed anew
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
    journal: Journal | OfText | None = None,
    stopping: Stopping | None = None,
    dense: TensorParallelLM | None = None,
) -> tuple[Baseline, list[Comparison]]:
    """The dense model and every experiment on `sequences` of token ids; results in the order of `experiments`.

    One batch's hidden states are held at a time: each experiment starts from those that enter its first dropped
    block; those of a model that is read from disk go through its blocks together. `tick` is called after each batch of
    each experiment. What `journal` holds is not measured again; what `stopping` finds decided is not measured on
    further batches, and has fewer `sequences`. Leaves every sync point kept.

    `dense` is what everything is compared with where that is not `lm` with every sync point kept: the model that a
    recovered one was made from. Both have the same head. Raises InputError, naming the block, for NaN or Inf.
    """
    dense = dense or lm
    unplanned, tallies = Tally(), [Tally() for _ in experiments]
    count, seen = math.ceil(len(sequences) / batch_size), [0] * len(experiments)
    active = set(range(len(experiments)))
    first_pass = True
    while active or first_pass:
        for number, (input_ids, lengths) in enumerate(batches(sequences, batch_size, lm.device)):
            wanted = [experiments[i] for i in sorted(active) if seen[i] == number]
            batch = (_Together if lm.streamed else _Batch)(lm, dense, input_ids, lengths, wanted)
            if first_pass:
                found = Tally.of_state(once(journal, (number, "dense"), batch.dense))
                _check_finite(found, dense, input_ids)
                unplanned.add(found)
            for i in sorted(active):
                if seen[i] == number:
                    found = Tally.of_state(once(journal, (number, i), partial(batch.planned, experiments[i])))
                    _check_finite(found, lm, input_ids, experiments[i])
                    tallies[i].add(found)
                    seen[i] += 1
                    tick(i, tallies[i])
            if stopping is not None and first_pass:
                active -= from_main_rank(stopping.decided(tallies, active, number + 1, count))  # never half the ranks
        active = set() if stopping is None else from_main_rank(stopping.wanting(tallies, count))
        first_pass = False
    return unplanned.baseline(), [tally.comparison() for tally in tallies]


def _check_finite(tally: Tally, lm: TensorParallelLM, input_ids: Tensor, experiment: Experiment | None = None) -> None:
    """Raises InputError that names the block where NaN or Inf first appears, if `tally` of these tokens holds any."""
    if not tally.finite():
        lm.keep_all()
        if experiment is not None:
            lm.set_strategies(experiment.attention, experiment.mlp)
        refuse_not_finite(lm, input_ids)


class _Batch:
    """One batch on the model with every sync point kept, recorded when something is first measured on it."""

    def __init__(
        self, lm: TensorParallelLM, dense: TensorParallelLM, input_ids: Tensor, lengths: list[int], wanted: Sequence
    ):
        self.lm, self.dense_lm, self.input_ids, self.lengths = lm, dense, input_ids, lengths

    @cached_property
    def recording(self) -> Recording:
        self.lm.keep_all()
        return self.lm.record(self.input_ids)

    @cached_property
    def reference(self) -> "Reference":
        same = self.dense_lm is self.lm
        final = self.recording.final if same else self.dense_lm.record(self.input_ids).final
        return Reference(self.lm, final, self.input_ids, self.lengths)

    def dense(self) -> dict:
        return self.reference.compare(self.reference.final, False).state()

    def planned(self, experiment: Experiment) -> dict:
        """Leaves every sync point kept."""
        lm, final = self.lm, self.recording.final
        lm.set_strategies(experiment.attention, experiment.mlp)
        if experiment.first < lm.num_blocks:
            final = lm.resume(self.recording, experiment.first)
        tally = self.reference.compare(final, lm.head.streams_differ)
        lm.keep_all()
        return tally.state()


class _Together:
    """One batch on the dense model and on `experiments`, as many at a time as memory allows."""

    def __init__(
        self, lm: TensorParallelLM, dense: TensorParallelLM, input_ids: Tensor, lengths: list[int],
        experiments: Sequence[Experiment],
    ):  # fmt: skip
        self.lm, self.dense_lm, self.input_ids, self.lengths = lm, dense, input_ids, lengths
        self.experiments = experiments
        self.finals: dict[Experiment, Tensor] = {}
        self.reference: Reference | None = None

    def dense(self) -> dict:
        self._run(0)
        assert self.reference is not None
        return self.reference.compare(self.reference.final, False).state()

    def planned(self, experiment: Experiment) -> dict:
        if experiment not in self.finals:
            self._run(self.experiments.index(experiment))
        assert self.reference is not None
        settled = [a for a, _ in self.lm.settled]
        return self.reference.compare(self.finals[experiment], PLAIN in (*experiment.attention, *settled)).state()

    def _run(self, first: int) -> None:
        self.finals = {}
        some = self.experiments[first : first + at_a_time(self.lm, self.input_ids)]
        final, finals = run_together(self.lm, self.input_ids, some)
        self.finals = dict(zip(some, finals, strict=True))
        if self.reference is None:
            if self.dense_lm is not self.lm:
                final, _ = run_together(self.dense_lm, self.input_ids, [])
            self.reference = Reference(self.lm, final, self.input_ids, self.lengths)


def batches(sequences: Sequence[Sequence[int]], size: int, device: torch.device) -> Iterator[tuple[Tensor, list[int]]]:
    """Token ids [B, T], padded on the right (no real token of a causal model ever sees that), and their lengths."""
    for start in range(0, len(sequences), size):
        rows = [torch.tensor(s) for s in sequences[start : start + size]]
        yield torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device), [len(r) for r in rows]


class Reference:
    """The dense model's predictions for one batch, which any number of plans is compared with.

    `final` [B, T, d] is what left the dense model's final norm.
    """

    def __init__(self, lm: TensorParallelLM, final: Tensor, input_ids: Tensor, lengths: Sequence[int]):
        self.lm, self.final, self.lengths = lm, final, lengths
        self.predicting = torch.arange(final.shape[1])[None] < torch.tensor(lengths)[:, None] - 1  # [B, T]
        self.predicting = self.predicting.to(final.device)
        self.targets = input_ids[:, 1:][self.predicting[:, :-1]]
        tokens, vocabulary = len(self.targets), lm.head.vocab_size
        step = max(1, LOGITS_AT_A_TIME // vocabulary)
        self.chunks = [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]
        self.held: Tensor | None = None  # log-probabilities [N, V], in one piece: many would leave holes in the heap
        if tokens * vocabulary <= LOGITS_HELD:
            held = final.new_empty(tokens, vocabulary, dtype=torch.float32)
            for chunk in self.chunks:
                held[chunk] = self._log_probs(final[None, self.predicting], chunk, False)
            self.held = held

    def compare(self, planned: Tensor, streams_differ: bool) -> Tally:
        """planned [B, T, d], or [ranks * B, T, d] where the ranks' streams differ."""
        streams = planned.unflatten(0, (-1, len(self.lengths)))[:, self.predicting]  # [1 or ranks, N, d]
        dense = streams if planned is self.final or self.held is not None else self.final[None, self.predicting]
        rows, tally = [], Tally()
        for chunk in self.chunks:
            log_p = self._log_probs(dense, chunk, False) if self.held is None else self.held[chunk]
            log_q = log_p if planned is self.final else self._log_probs(streams, chunk, streams_differ)
            found, largest = log_prob_metrics(log_p, log_q, self.targets[chunk])
            rows.append(found.cpu())
            tally.max_abs_logprob_diff = max(tally.max_abs_logprob_diff, largest)
        tally.tokens = [length - 1 for length in self.lengths]
        tally.sums = [of_sequence.sum(0) for of_sequence in torch.cat(rows).split(tally.tokens)]
        return tally

    def _log_probs(self, hidden: Tensor, chunk: slice, streams_differ: bool) -> Tensor:
        """Of some of the positions of `hidden` [1 or ranks, N, d]."""
        before, self.lm.head.streams_differ = self.lm.head.streams_differ, streams_differ
        logits = self.lm.logits(hidden[:, chunk])[0]
        self.lm.head.streams_differ = before
        return logits.float().log_softmax(-1)


def compare(
    lm: TensorParallelLM,
    dense: Tensor,
    planned: Tensor,
    streams_differ: bool,
    input_ids: Tensor,
    lengths: Sequence[int],
    tally: Tally,
) -> None:
    """Add one batch's comparison to `tally`; dense and planned as Reference and Reference.compare take them."""
    tally.add(Reference(lm, dense, input_ids, lengths).compare(planned, streams_differ))
