"""Measuring plans: each is run as a whole, and compared with the dense model on the same tokens.

Profiling one sync point, profiling in the paper's cumulative order and verifying a finished plan all do this, each with
its own list of drops.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from spd_calib.formats.drops import NOTHING_DROPPED, Drops
from spd_calib.formats.profile import Baseline, Comparison
from spd_calib.parallel.distributed import from_main_rank
from spd_calib.parallel.model import Recording, TensorParallelLM

from .journal import Journal, once
from .lockstep import at_a_time, run_in_lockstep
from .metrics import Tally, log_prob_metrics
from .tiers import Stopping

LOGITS_AT_A_TIME = 2**22  # float32 logits compared at once: 16 MiB a tensor
LOGITS_HELD = 2**24  # log-probabilities of the dense model held for a batch, 64 MiB; beyond that computed anew
Tick = Callable[[int, Tally | None], None]  # (index of the plan, its tally so far), after each batch


@dataclass(frozen=True)
class Subject:
    """The subject of measurements: a model, its drops in all of them, and the dense model it is compared with.

    For an ordinary model the last two are left out: nothing is always dropped, and it is its own dense model. A
    checkpoint that `recover` wrote has both: its blocks were fitted to run without their syncs, so these are dropped
    `always`, and it is compared with the `original` that it was made from, which has the same output head.
    """

    lm: TensorParallelLM
    always: Drops = NOTHING_DROPPED
    original: TensorParallelLM | None = None

    @property
    def dense(self) -> TensorParallelLM:
        """Return the model that everything is compared with, run with nothing dropped."""
        return self.original or self.lm


def measure(
    subject: Subject,
    sequences: Sequence[Sequence[int]],
    *,
    plans: Sequence[Drops],
    batch_size: int = 8,
    tick: Tick | None = None,
    journal: Journal | None = None,
    stopping: Stopping | None = None,
) -> tuple[Baseline, list[Comparison]]:
    """Measure the dense model, and each of `plans` against it, on `sequences` of token ids.

    A plan is run with what the subject drops always. Returns the dense model's baseline, and one comparison for each
    plan in their order. Plans that `stopping` finds decided are not measured on further batches; their comparisons
    count fewer sequences. `tick` is called after each batch of each plan. What `journal` holds is not measured again.

    Only one batch's hidden states are held at a time. Each plan is run from those that enter the first block in which
    it drops something; the plans of a model that is read from disk go through its blocks in lockstep (lockstep.py).

    Raises InputError that names the block where NaN or Inf first appears, if any does.
    """
    of_dense, tallies = Tally(), [Tally() for _ in plans]
    count = math.ceil(len(sequences) / batch_size)  # of batches
    seen = [0] * len(plans)  # batches that each plan was measured on: always the first ones
    active = set(range(len(plans)))  # plans to go on with; a pass after the first completes some that were stopped
    first_pass = True
    while active or first_pass:
        for number, (input_ids, lengths) in enumerate(batches(sequences, batch_size, subject.lm.device)):
            wanted = [plans[i] for i in sorted(active) if seen[i] == number]
            batch: _Recorded | _InLockstep
            if subject.lm.streamed:
                batch = _InLockstep(subject, input_ids, lengths, plans=wanted)
            else:
                batch = _Recorded(subject, input_ids, lengths)
            if first_pass:
                found = Tally.of_state(once(journal, (number, "dense"), batch.dense))
                _check_finite(found, subject.dense, input_ids)
                of_dense.add(found)
            for i in sorted(active):
                if seen[i] == number:
                    found = Tally.of_state(once(journal, (number, i), partial(batch.planned, plans[i])))
                    _check_finite(found, subject.lm, input_ids, drops=subject.always | plans[i])
                    tallies[i].add(found)
                    seen[i] += 1
                    if tick is not None:
                        tick(i, tallies[i])
            if stopping is not None and first_pass:
                active -= from_main_rank(stopping.decided(tallies, active, number + 1, count))  # one answer on all
        active = set() if stopping is None else from_main_rank(stopping.wanting(tallies, count))
        first_pass = False
    return of_dense.baseline(), [tally.comparison() for tally in tallies]


def _check_finite(tally: Tally, lm: TensorParallelLM, input_ids: Tensor, *, drops: Drops | None = None) -> None:
    """Raise InputError if `tally` holds NaN or Inf, naming the block where `lm` under `drops` first gives any.

    input_ids [B, T] are the tokens the tally is of.
    """
    if not tally.finite():
        with lm.running(drops or NOTHING_DROPPED):
            lm.refuse_nonfinite(input_ids)


class _Recorded:
    """One batch on a model in memory: recorded once, resumed for every plan.

    Nothing is run before `dense` or `planned` asks for it, since a journal may hold all that is wanted of the batch.
    """

    def __init__(self, subject: Subject, input_ids: Tensor, lengths: list[int]):
        self.subject, self.input_ids, self.lengths = subject, input_ids, lengths

    @cached_property
    def recording(self) -> Recording:
        with self.subject.lm.running(self.subject.always):
            return self.subject.lm.record(self.input_ids)

    @cached_property
    def reference(self) -> "Reference":
        dense = self.subject.dense
        if dense is self.subject.lm and not self.subject.always:
            final = self.recording.final
        else:
            with dense.running(NOTHING_DROPPED):
                final = dense.record(self.input_ids).final
        return Reference(self.subject.lm, final, input_ids=self.input_ids, lengths=self.lengths)

    def dense(self) -> dict:
        return self.reference.compare(self.reference.final).state()

    def planned(self, drops: Drops) -> dict:
        final = self.subject.lm.resume(self.recording, self.recording.drops | drops)
        return self.reference.compare(final).state()


class _InLockstep:
    """One batch on a model that is read from disk: the dense model and `plans`, as many at a time as memory allows.

    Used as _Recorded is; nothing is run before it is asked for here, either.
    """

    def __init__(self, subject: Subject, input_ids: Tensor, lengths: list[int], *, plans: Sequence[Drops]):
        self.subject, self.input_ids, self.lengths, self.plans = subject, input_ids, lengths, plans
        self.finals: dict[Drops, Tensor] = {}
        self.reference: Reference | None = None

    def dense(self) -> dict:
        reference = self._run(0)
        return reference.compare(reference.final).state()

    def planned(self, drops: Drops) -> dict:
        reference = self.reference
        if reference is None or drops not in self.finals:
            reference = self._run(self.plans.index(drops))
        return reference.compare(self.finals[drops]).state()

    def _run(self, first: int) -> "Reference":
        """Run as many plans as memory allows, from index `first` on; return what they are compared with."""
        self.finals = {}
        lm, original = self.subject.lm, self.subject.original
        some = self.plans[first : first + at_a_time(lm, self.input_ids)]
        final, finals = run_in_lockstep(lm, self.input_ids, [self.subject.always | drops for drops in some])
        self.finals = dict(zip(some, finals, strict=True))
        if self.reference is None:
            if original is not None:
                final, _ = run_in_lockstep(original, self.input_ids, [])
            self.reference = Reference(lm, final, input_ids=self.input_ids, lengths=self.lengths)
        return self.reference


def batches(sequences: Sequence[Sequence[int]], size: int, device: torch.device) -> Iterator[tuple[Tensor, list[int]]]:
    """Yield token ids [B, T] for every `size` sequences, and the sequences' lengths.

    They are padded on the right: in a causal model no real token sees the padding.
    """
    for start in range(0, len(sequences), size):
        rows = [torch.tensor(s) for s in sequences[start : start + size]]
        yield torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device), [len(r) for r in rows]


class Reference:
    """The dense model's predictions for one batch of token ids [B, T], with which any number of plans are compared.

    `final` [B, T, d] is what left the dense model's final norm. Its log-probabilities are kept for all comparisons
    where they are at most LOGITS_HELD numbers.
    """

    def __init__(self, lm: TensorParallelLM, final: Tensor, *, input_ids: Tensor, lengths: Sequence[int]):
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
                held[chunk] = self._log_probs(final[None, self.predicting], chunk)
            self.held = held

    def compare(self, planned: Tensor) -> Tally:
        """Compare what left a plan's final norm, [B, T, d] or head.PerRank, with what left the dense model's.

        Returns a tally of the batch's sequences. `planned` may be `final` itself: the dense model with itself.
        """
        streams = planned.unflatten(0, (-1, len(self.lengths)))[:, self.predicting]  # [1 or ranks, N, d]
        # `dense` is not looked at where self.held is there: any tensor will do
        dense = streams if planned is self.final or self.held is not None else self.final[None, self.predicting]
        rows, tally = [], Tally()
        for chunk in self.chunks:
            log_p = self._log_probs(dense, chunk) if self.held is None else self.held[chunk]
            log_q = log_p if planned is self.final else self._log_probs(streams, chunk)
            found, largest = log_prob_metrics(log_p, log_q, self.targets[chunk])
            rows.append(found.cpu())
            tally.max_abs_logprob_diff = max(tally.max_abs_logprob_diff, largest)
        tally.tokens = [length - 1 for length in self.lengths]
        tally.sums = [of_sequence.sum(0) for of_sequence in torch.cat(rows).split(tally.tokens)]
        return tally

    def _log_probs(self, hidden: Tensor, chunk: slice) -> Tensor:
        """Return log-probabilities [n, V] of some of the positions of `hidden` [1 or ranks, N, d].

        To the head these are one sequence of n tokens: [B, T, d] or head.PerRank with B = 1.
        """
        return self.lm.logits(hidden[:, chunk])[0].float().log_softmax(-1)
