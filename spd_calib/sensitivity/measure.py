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
from spd_calib.parallel.routing import Chosen, tokens_routed_alike, watching_routers

from .journal import Journal, once
from .lockstep import at_a_time, run_in_lockstep
from .metrics import Tally
from .reference import Reference, plans_at_a_time
from .tiers import Stopping

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
    What leaves the final norm is held for some plans, which then go through the vocabulary together (reference.py).

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
            batch = _Batch(subject, input_ids, lengths, plans=wanted)
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


class _Batch:
    """One batch of token ids [B, T]: the dense model and `plans`, as many at a time as memory allows.

    Nothing is run before `dense` or `planned` asks for it, since a journal may hold all that is wanted of the batch.
    """

    def __init__(self, subject: Subject, input_ids: Tensor, lengths: list[int], *, plans: Sequence[Drops]):
        self.subject, self.input_ids, self.lengths, self.plans = subject, input_ids, lengths, plans
        self.reference: Reference | None = None
        self.found: dict[Drops, Tally] = {}
        self.dense_experts: Chosen = {}
        self.recorded_experts: Chosen = {}
        self.routed: dict[Drops, list[float]] = {}

    def dense(self) -> dict:
        return (self.reference or self._run(0)).tally().state()

    def planned(self, drops: Drops) -> dict:
        if drops not in self.found:
            self._run(self.plans.index(drops))
        return self.found[drops].state()

    def _run(self, first: int) -> Reference:
        """Run and compare as many plans as memory allows, from index `first` on; return what they are compared with."""
        self.found = {}
        run = self._in_lockstep if self.subject.lm.streamed else self._resumed
        reference, some, streams = run(first)
        self.found = dict(zip(some, reference.compare(streams), strict=True))
        for drops, tally in self.found.items():
            tally.routed = self.routed.get(drops, [])
        return reference

    def _resumed(self, first: int) -> tuple[Reference, Sequence[Drops], list[Tensor]]:
        """Run plans of a model in memory: the batch is recorded once, and resumed for each of them."""
        lm, dense, recording = self.subject.lm, self.subject.dense, self.recording
        if self.reference is None:
            final, self.dense_experts = recording.final, self.recorded_experts
            if dense is not lm or self.subject.always:
                with dense.running(NOTHING_DROPPED), watching_routers(dense.blocks) as self.dense_experts:
                    final = dense.record(self.input_ids).final
            self.reference = Reference(lm, final, input_ids=self.input_ids, lengths=self.lengths)
        reference = self.reference
        some = self.plans[first : first + plans_at_a_time(lm, len(reference.targets))]
        return reference, some, [self._resume(drops, reference) for drops in some]

    def _resume(self, drops: Drops, reference: Reference) -> Tensor:
        """Return the streams of one plan, and keep how many tokens of each sequence are routed as dense."""
        with watching_routers(self.subject.lm.blocks) as experts:
            final = self.subject.lm.resume(self.recording, self.recording.drops | drops)
        planned = {**self.recorded_experts, **experts}
        self.routed[drops] = tokens_routed_alike(self.dense_experts, planned, reference.predicting)
        return reference.streams(final)

    @cached_property
    def recording(self) -> Recording:
        lm = self.subject.lm
        with lm.running(self.subject.always), watching_routers(lm.blocks) as self.recorded_experts:
            return lm.record(self.input_ids)

    def _in_lockstep(self, first: int) -> tuple[Reference, Sequence[Drops], list[Tensor]]:
        """Run plans of a model that is read from disk: they go through its blocks together."""
        lm, original = self.subject.lm, self.subject.original
        some = self.plans[first : first + at_a_time(lm, self.input_ids)]
        own, carried = run_in_lockstep(lm, self.input_ids, [self.subject.always | drops for drops in some])
        if self.reference is None:
            dense = own if original is None else run_in_lockstep(original, self.input_ids, [])[0]
            self.reference = Reference(lm, dense.final, input_ids=self.input_ids, lengths=self.lengths)
            self.dense_experts = dense.experts
        reference = self.reference
        for drops, of_plan in zip(some, carried, strict=True):
            planned = {**own.experts, **of_plan.experts}
            self.routed[drops] = tokens_routed_alike(self.dense_experts, planned, reference.predicting)
        return reference, some, [reference.streams(of_plan.final) for of_plan in carried]


def batches(sequences: Sequence[Sequence[int]], size: int, device: torch.device) -> Iterator[tuple[Tensor, list[int]]]:
    """Yield token ids [B, T] for every `size` sequences, and the sequences' lengths.

    They are padded on the right: in a causal model no real token sees the padding.
    """
    for start in range(0, len(sequences), size):
        rows = [torch.tensor(s) for s in sequences[start : start + size]]
        yield torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device), [len(r) for r in rows]
