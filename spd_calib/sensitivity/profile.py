"""The two ways of profiling: one sync point at a time, or the paper's, cumulatively from the last block backwards."""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

from spd_calib.formats.common import Strategy
from spd_calib.formats.profile import Baseline, Comparison, Measurement, Point, SyncPoint
from spd_calib.parallel.model import TensorParallelLM

from .journal import Journal, OfText, once
from .measure import Experiment, Tick, measure
from .tiers import Stopping

Method = Literal["single", "cumulative"]
TaskAccuracy = Callable[[], dict[str, float]]  # of the model as it is set at the moment, by lm-eval task


class Trial(NamedTuple):
    """One experiment of a profile: the block it is about, and all blocks dropped in it."""

    block: int
    strategy: Strategy
    dropped: list[int]
    sync_point: SyncPoint = "attention"


def drops(
    method: Method,
    strategies: Sequence[Strategy],
    num_blocks: int,
    sync_points: Sequence[SyncPoint] = ("attention",),
    settled: Sequence[Point] = (),
) -> Iterator[Trial]:
    """The experiments of a profile.

    single: each sync point alone; the MLP's can only be deferred (block_drop), and the last block's cannot.
    cumulative: block b with all behind it, from the last block backwards, so that consecutive results differ by one
    block (paper, section 4.2; the differences are Profile.sensitivity's); the attention's sync points alone.
    What is `settled` as dropped is not tried.
    """

    def open_points(kind: SyncPoint, blocks: int) -> list[int]:
        return [b for b in range(blocks) if Point(block=b, sync_point=kind) not in settled]

    for strategy in strategies if "attention" in sync_points else ():
        if method == "single":
            yield from (Trial(block, strategy, [block]) for block in open_points("attention", num_blocks))
        else:
            yield from (Trial(block, strategy, list(range(block, num_blocks))) for block in reversed(range(num_blocks)))
    if "mlp" in sync_points:
        yield from (Trial(block, Strategy.BLOCK_DROP, [block], "mlp") for block in open_points("mlp", num_blocks - 1))


def settled_points(lm: TensorParallelLM) -> list[Point]:
    """Sync points that `lm` never keeps."""
    both: tuple[SyncPoint, SyncPoint] = "attention", "mlp"
    return [
        Point(block=block, sync_point=kind)
        for block, pair in enumerate(lm.settled)
        for kind, strategy in zip(both, pair, strict=True)
        if strategy != Strategy.KEEP_SYNC
    ]


def experiments_of(plan: Sequence[Trial], num_blocks: int) -> list[Experiment]:
    return [
        Experiment.of({Point(block=b, sync_point=t.sync_point): t.strategy for b in t.dropped}, num_blocks)
        for t in plan
    ]


def profile(
    lm: TensorParallelLM,
    sequences: Sequence[Sequence[int]],
    method: Method,
    strategies: Sequence[Strategy],
    batch_size: int,
    tick: Tick,
    task_accuracy: TaskAccuracy | None = None,
    sync_points: Sequence[SyncPoint] = ("attention",),
    journal: Journal | OfText | None = None,
    confidence: float | None = None,
    recovered_from: TensorParallelLM | None = None,
) -> tuple[Baseline, list[Measurement], Comparison | None]:
    """Run every experiment of the profile; `task_accuracy` is called for the dense model and for each experiment.

    What `journal` holds is not run again. With `confidence` (method single) a candidate is measured only until its
    tier is that certain; perplexities are then those of the baseline's text: the increase is the candidate's own.
    Where `lm` was recovered, everything is compared with `recovered_from`, and the third value is `lm` with nothing
    dropped but what is settled.
    """
    plan = list(drops(method, strategies, lm.num_blocks, sync_points, settled_points(lm)))
    experiments = experiments_of(plan, lm.num_blocks)
    nothing = [Experiment.of({}, lm.num_blocks)] if recovered_from else []
    stopping = None
    if confidence is not None:
        kinds = [(t.strategy, t.sync_point) for t in plan]
        groups = [[i for i, kind in enumerate(kinds) if kind == of] for of in dict.fromkeys(kinds)]
        stopping = Stopping(groups, confidence, len(sequences))
    baseline, comparisons = measure(
        lm,
        sequences,
        [*experiments, *nothing],
        batch_size,
        lambda i, tally: tick(i, tally) if i < len(plan) else None,
        journal,
        stopping,
        recovered_from,
    )
    dense, lost = {}, [{} for _ in plan]  # type: dict[str, float], list[dict[str, float]]
    if task_accuracy is not None:
        dense = once(journal, ("tasks", "dense"), task_accuracy)
        for i, experiment in enumerate(experiments):
            lm.set_strategies(experiment.attention, experiment.mlp)
            accuracies = once(journal, ("tasks", i), task_accuracy)
            lost[i] = {task: dense[task] - accuracy for task, accuracy in accuracies.items()}
            tick(i, None)
        lm.keep_all()
    measurements = [
        Measurement(**{**_on_all_text(c, baseline), **t._asdict(), "task_accuracy_drop": task_drop})
        for c, t, task_drop in zip(comparisons[: len(plan)], plan, lost, strict=True)
    ]
    alone = comparisons[-1] if nothing else None
    return baseline.model_copy(update={"task_accuracy": dense}), measurements, alone


def _on_all_text(c: Comparison, baseline: Baseline) -> dict:
    if c.tokens == baseline.tokens:
        return vars(c)
    return {**vars(c), "ppl": max(1.0, baseline.ppl * (1 + c.ppl_increase)), "stopped_early": True}
