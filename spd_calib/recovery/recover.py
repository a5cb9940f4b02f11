"""Treating the blocks of a plan: what is tried, in which order, and what is kept.

Never worse: a treatment stays only where the KL of the whole plan, on text that nothing was fitted on, falls by more
than the standard error of that fall. Everything tried stands in the report.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal, Protocol, TypeVar

from torch import Tensor

from spd_calib.errors import InputError
from spd_calib.formats.common import Strategy
from spd_calib.parallel.comm import Comm, Simulated
from spd_calib.parallel.distributed import from_main_rank
from spd_calib.sensitivity.tiers import Tier

from . import compensation, grouping
from .distillation import Outcome, Save, Schedule, distil_block, distil_whole
from .moments import Moments, moments
from .permute import entries
from .planned import Batch, Feed, HeldOut, PlannedModel, Student, fall
from .report import Attempt, Report

Method = Literal["grouping", "compensation", "distillation"]
T = TypeVar("T")
METHODS: tuple[Method, ...] = ("grouping", "compensation", "distillation")
GROUPING_BATCHES = 8  # neurons are placed by as much of the text; predictors are fitted on all of it


@dataclass(frozen=True)
class Options:
    methods: tuple[Method, ...] = METHODS
    max_rank: int | None = None  # of the predictor; 0: the mean shift only; None: up to the full one
    exchange: float = 1.0  # compensation.choose
    own_inputs: bool = True  # fit and train on the planned model's own streams, not on the dense model's
    fisher: bool = True  # neurons' errors weighed by what they cost in KL (one backward pass over some text)
    block_schedule: Schedule = field(default_factory=Schedule)
    whole_schedule: Schedule = field(default_factory=Schedule)
    batch_size: int = 16
    seed: int = 0


class Keeper(Protocol):
    """Where a run leaves what it has so far, so that a killed one can go on."""

    def save(self, name: str, tensors: dict[str, Tensor], note: dict) -> None: ...

    def load(self, name: str) -> tuple[dict[str, Tensor], dict] | None: ...


class Forgetful:
    """Keeps nothing."""

    def save(self, name: str, tensors: dict[str, Tensor], note: dict) -> None:
        pass

    def load(self, name: str) -> tuple[dict[str, Tensor], dict] | None:
        return None


def recover(
    model: PlannedModel,
    fitting: Sequence[Sequence[int]],
    held_out: Sequence[Sequence[int]],
    block_tiers: Mapping[int, Tier],
    options: Options,
    keeper: Keeper | None = None,
    tick: Callable[[str], None] = lambda note: None,
    replicas: Comm | None = None,
) -> Report:
    """Treat the dropped blocks of `model` by tier; its students are what was kept.

    Fitted on `fitting` (the last eighth chooses ridges, heads and when training stops), judged on `held_out`. Several
    `replicas`, each with a model of its own, train together; the rest the main one does, and only its report counts.
    """
    if not model.students:
        raise InputError("The plan drops nothing, so there is nothing to recover; plan with a larger budget.")
    if len(fitting) < 8 or len(held_out) < 2:
        raise InputError(
            f"{len(fitting)} sequences to fit on and {len(held_out)} to judge by are too few to recover with (8 and 2 "
            "at least); give more text, or lower --seq-len or --min-len."
        )
    return _Recovery(model, fitting, held_out, block_tiers, options, keeper or Forgetful(), tick, replicas).run()


class _Recovery:
    def __init__(self, model, fitting, held_out, block_tiers, options: Options, keeper: Keeper, tick, replicas):
        self.model: PlannedModel = model
        self.fitting, self.options, self.keeper, self.tick = fitting, options, keeper, tick
        self.replicas: Comm = replicas or Simulated(1)
        self.is_main = self.replicas.ranks[0] == 0
        self.held = HeldOut(model, held_out if self.is_main else [], options.batch_size)
        self.tally = self.held.measure()
        self.report = Report(dict(block_tiers), self.tally.kl() if self.is_main else 0.0)
        self.metrics: list[Tensor] | None = None

    def run(self) -> Report:
        blocks = [
            i
            for i, s in sorted(self.model.students.items())
            if s.block.attention_strategy == Strategy.BLOCK_DROP and self.report.tiers.get(i) != "insensitive"
        ]
        methods = self.options.methods
        if self.is_main and ("grouping" in methods or "compensation" in methods):
            feed = self._feed(Simulated(1))
            if "grouping" in methods and self.options.fisher and not feed_too_large(feed):
                self.metrics = grouping.fisher(feed, self._split(feed)[0][:GROUPING_BATCHES], self.options.seed)
            for block in blocks:
                feed.move_to(block)
                self._closed_form(block, feed)
        self._share(blocks)
        if "distillation" in methods:
            feed = self._feed(self.replicas)
            for block in blocks:
                feed.move_to(block)
                self._distil(block, feed)
            if blocks:
                self._distil_together(blocks)
        self.report.kl = self.tally.kl() if self.is_main else 0.0
        return self.report

    def _feed(self, replicas: Comm) -> Feed:
        return Feed(self.model, self.fitting, min(self.options.batch_size, max(1, len(self.fitting) // 8)), replicas)

    def _share(self, blocks: Sequence[int]) -> None:
        """What the main replica made of the blocks, on all."""
        for block in blocks if self.replicas.size > 1 else ():
            state = self._agreed(self.model.students[block].state)
            if not self.is_main and state is not None:
                self._take(block, state)

    def _split(self, feed: Feed) -> tuple[list[Batch], list[Batch]]:
        """Batches to fit on, and the last eighth to choose by."""
        kept = max(1, len(feed.batches) // 8)
        return feed.batches[:-kept], feed.batches[-kept:]

    def _closed_form(self, block: int, feed: Feed) -> None:
        """The predictor on the heads as they are; then heads and neurons under it, its predictor fitted anew."""
        o, methods = self.options, self.options.methods
        extreme = self.report.tiers.get(block) == "extremely sensitive"
        group = "grouping" in methods and (extreme or "distillation" not in methods)
        train, kept = self._split(feed)
        name = f"closed-form-{block}"
        if self._resume(self.keeper.load(name)):
            return
        fitted = held = None
        untreated = self.model.student_of(block)  # the moments are of its order of heads
        if "compensation" in methods:
            fitted, held = (moments(self.model.students[block], feed, part, o.own_inputs) for part in (train, kept))
            started = time.monotonic()
            student = self.model.student_of(block)
            fit = self._fit(student, fitted, held)
            student.block.set_compensation(dict(enumerate(fit.predictors)))
            if not self._try(student, "compensation", started, _detail(fit)) and fit.form.kind != "mean":
                student = self.model.student_of(block)
                fit = compensation.fit(student, feed.model.lm.comm.size, fitted, held, [compensation.Form("mean")])[0]
                student.block.set_compensation(dict(enumerate(fit.predictors)))
                self._try(student, "compensation", started, _detail(fit))
        if group:
            with_predictor = self.model.students[block].block.compensation is not None
            if fitted is None or held is None:
                fitted, held = (moments(self.model.students[block], feed, part, o.own_inputs) for part in (train, kept))
            started = time.monotonic()
            grouped, detail = self._group(untreated, feed, fitted, held, with_predictor)
            self._try(grouped, "grouping", started, detail)
            if "compensation" in methods and not with_predictor:  # no gain alone; under a grouping it may be one
                started = time.monotonic()
                both, detail = self._group(untreated, feed, fitted, held, True)
                self._try(both, "grouping+compensation", started, detail)
        self._keep(name, block)

    def _fit(self, student: Student, fitted: Moments, held: Moments) -> compensation.Fit:
        block, tp = student.block, student.block.comm.size
        forms = compensation.ladder(self.options.max_rank, block.d_rank)
        fits = compensation.fit(student, tp, fitted, held, forms)
        weights = sum(linear.weight.numel() for linear in student.parts.linears) // tp
        return compensation.choose(fits, block.d_rank, block.width, weights, self.options.exchange)

    def _group(
        self, untreated: Student, feed: Feed, fitted: Moments, held: Moments, predict: bool
    ) -> tuple[Student, dict]:
        """The best measured order of heads, each with its own predictor and neurons: least distortion of the block."""
        train, kept = self._split(feed)
        own, found = self.options.own_inputs, []
        for name, order in grouping.head_orders(untreated, fitted, self.options.seed).items():
            student = untreated.copy()
            grouping.group_heads(student, order)
            detail: dict = {"heads": name}
            if predict:
                z = entries(order, student.counts.head_dim).to(fitted.mean.device)
                fit = self._fit(student, fitted.permuted(z), held.permuted(z))
                student.block.set_compensation(dict(enumerate(fit.predictors)))
                detail |= _detail(fit)
            metric = self.metrics[student.block.index] if self.metrics else None
            grouping.group_neurons(student, feed, train[:GROUPING_BATCHES], own, metric)
            detail["distortion"] = grouping.distortion(student, feed, kept, own)
            found.append((detail["distortion"], student, detail))
        _, student, detail = min(found, key=lambda t: t[0])
        return student, detail | {"tried": {d["heads"]: d["distortion"] for _, _, d in found}}

    def _distil(self, block: int, feed: Feed) -> None:
        name = f"distilled-{block}"
        if self._resume(self._agreed(lambda: self.keeper.load(name))):
            return
        started = time.monotonic()
        student = self.model.student_of(block)
        train, kept = self._split(feed)
        saved = self._agreed(lambda: self.keeper.load("training-" + name))
        outcome = distil_block(
            student, feed, train, kept, self.options.own_inputs, self.options.block_schedule, saved and saved[0],
            self._saving(name),
            lambda note: self.tick(f"distilling block {block}, {note}"),
        )  # fmt: skip
        before = self.model.put(student)
        if not self._agreed(lambda: self._judge(block, "distillation", started, _outcome(outcome))):
            self.model.put(before)
        self._keep(name, block)

    def _distil_together(self, blocks: Sequence[int]) -> None:
        name = "distilled-together"
        if self._resume(self._agreed(lambda: self.keeper.load(name))):
            return
        started = time.monotonic()
        feed = self._feed(self.replicas)
        train, kept = self._split(feed)
        before = {b: self.model.put(self.model.student_of(b)) for b in blocks}
        students = [self.model.students[b] for b in blocks]
        saved = self._agreed(lambda: self.keeper.load("training-" + name))
        outcome = distil_whole(
            feed, students, train, kept, self.options.whole_schedule, saved and saved[0],
            self._saving(name),
            lambda note: self.tick(f"distilling all treated blocks together, {note}"),
        )  # fmt: skip
        if not self._agreed(lambda: self._judge(None, "distillation end to end", started, _outcome(outcome))):
            for student in before.values():
                self.model.put(student)
        self._keep(name, *blocks)

    def _try(self, student: Student, treatment: str, started: float, detail: dict) -> bool:
        """Keep `student` in the plan where the whole plan is better for it."""
        before = self.model.put(student)
        kept = self._judge(student.block.index, treatment, started, detail)
        if not kept:
            self.model.put(before)
        return kept

    def _judge(self, block: int | None, treatment: str, started: float, detail: dict) -> bool:
        tally = self.held.measure()
        fell, error = fall(self.tally, tally)
        kept = fell > error
        attempt = Attempt(
            block, treatment, self.tally.kl(), tally.kl(), fell, error, kept, time.monotonic() - started, detail
        )
        self.report.attempts.append(attempt)
        where = "all treated blocks" if block is None else f"block {block}"
        verdict = "kept" if kept else "refused"
        self.tick(f"{where}, {treatment}: KL {self.tally.kl():.4f} -> {tally.kl():.4f}, {verdict}")
        if kept:
            self.tally = tally
        return kept

    def _saving(self, name: str) -> Save | None:
        """Where a training leaves its state: the main replica's is all replicas'."""
        return (lambda tensors: self.keeper.save("training-" + name, tensors, {})) if self.is_main else None

    def _agreed(self, of_main: Callable[[], T]) -> T | None:
        """What the main replica finds, on all."""
        return from_main_rank(of_main() if self.is_main else None)

    def _keep(self, name: str, *blocks: int) -> None:
        if not self.is_main:
            return
        tensors = {f"{b}/{n}": t for b in blocks for n, t in self.model.students[b].state().items()}
        self.keeper.save(name, tensors, {"attempts": [asdict(a) for a in self.report.attempts]})

    def _resume(self, saved: tuple[dict[str, Tensor], dict] | None) -> bool:
        """Take over what an interrupted run had finished."""
        if saved is None:
            return False
        tensors, note = saved
        by_block: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            index, _, rest = key.partition("/")
            by_block.setdefault(int(index), {})[rest] = tensor
        for block, state in by_block.items():
            self._take(block, state)
        self.report.attempts = [Attempt(**a) for a in note["attempts"]]
        self.tally = self.held.measure()
        return True

    def _take(self, block: int, state: dict[str, Tensor]) -> None:
        student = self.model.student_of(block)
        student.load(state)
        self.model.put(student)


def feed_too_large(feed: Feed) -> bool:
    """Is one [d, d] metric a block too much to hold? (half a gigabyte a block at d = 8192, float64)"""
    d, n = feed.batches[0].dense.shape[-1], feed.model.lm.num_blocks
    return d * d * 8 * n > 4 * 2**30


def _detail(fit: compensation.Fit) -> dict:
    return {"form": fit.form.kind, "rank": fit.form.rank, "left": fit.left}


def _outcome(outcome: Outcome) -> dict:
    return {"error_before": outcome.before, "error_after": outcome.after, "steps": outcome.steps}
