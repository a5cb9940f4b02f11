"""Profiling by measurements: of one sync point at a time, or cumulatively from the last block backwards (the paper)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from spd_calib.formats.drops import NOTHING_DROPPED, Drops, Point, Strategy, Sublayer
from spd_calib.formats.profile import Baseline, Comparison, Measurement

from .journal import Journal, once
from .measure import Subject, Tick, measure
from .tiers import Stopping

Method = Literal["single", "cumulative"]
TaskAccuracy = Callable[[], dict[str, float]]  # of the model under what it runs at the moment, by lm-eval task


@dataclass(frozen=True)
class Experiment:
    """One row of a profile: the sync point it is about, and everything dropped in it."""

    point: Point
    drops: Drops

    @property
    def strategy(self) -> Strategy:
        """Return the strategy at the sync point that the row is about."""
        return self.drops.strategy(self.point)


def experiments(
    method: Method,
    strategies: Sequence[Strategy],
    *,
    num_blocks: int,
    sync_points: Sequence[Sublayer] = ("attention",),
    always: Drops = NOTHING_DROPPED,
) -> Iterator[Experiment]:
    """Yield the experiments of a profile, for each of `strategies` in turn.

    single: each sync point alone, but for those dropped `always`. An MLP's can only be deferred (block_drop), once
    whatever `strategies` says; the last block's MLP cannot be dropped at all.
    cumulative: the attention of block b and of all blocks behind it, from the last block backwards, so that consecutive
    results differ by one block (paper, section 4.2; Profile.sensitivity takes the differences).
    """

    def alone(sublayer: Sublayer, blocks: int, strategy: Strategy) -> Iterator[Experiment]:
        for point in (Point(b, sublayer) for b in range(blocks)):
            if point not in always:
                yield Experiment(point, Drops.of({point: strategy}))

    for strategy in strategies if "attention" in sync_points else ():
        if method == "single":
            yield from alone("attention", num_blocks, strategy)
            continue
        for block in reversed(range(num_blocks)):
            points = [Point(b, "attention") for b in range(block, num_blocks)]
            yield Experiment(points[0], Drops.of(dict.fromkeys(points, strategy)))
    if "mlp" in sync_points:
        yield from alone("mlp", num_blocks - 1, Strategy.BLOCK_DROP)


def profile(
    subject: Subject,
    sequences: Sequence[Sequence[int]],
    *,
    rows: Sequence[Experiment],
    batch_size: int,
    tick: Tick | None = None,
    task_accuracy: TaskAccuracy | None = None,
    journal: Journal | None = None,
    confidence: float | None = None,
) -> tuple[Baseline, list[Measurement], Comparison | None]:
    """Measure every experiment of a profile (`rows`) on `sequences` of token ids.

    Returns the dense model's baseline, one measurement for each row, and, where the subject has an `original`, what
    it costs with nothing dropped but what it drops always (else None).

    `task_accuracy` is called for the dense model and then for each row, while the model runs it. With `confidence`
    (method single) a row is measured only until the tier of its sync point is that certain; its `ppl` is then the
    baseline's, which is of all sequences, raised by the increase on those it was measured on. `tick` and `journal` as
    in measure. Raises InputError as measure does.
    """
    nothing = [NOTHING_DROPPED] if subject.original else []
    stopping = None
    if confidence is not None:
        kinds = [(row.strategy, row.point.sync_point) for row in rows]
        groups = [[i for i, kind in enumerate(kinds) if kind == of] for of in dict.fromkeys(kinds)]
        stopping = Stopping(groups, confidence, len(sequences))
    baseline, comparisons = measure(
        subject,
        sequences,
        plans=[*(row.drops for row in rows), *nothing],
        batch_size=batch_size,
        tick=None if tick is None else lambda i, tally: tick(i, tally) if i < len(rows) else None,
        journal=journal,
        stopping=stopping,
    )
    dense, lost = {}, [{} for _ in rows]  # type: dict[str, float], list[dict[str, float]]
    if task_accuracy is not None:
        dense = once(journal, ("tasks", "dense"), task_accuracy)
        for i, row in enumerate(rows):
            with subject.lm.running(subject.always | row.drops):
                accuracies = once(journal, ("tasks", i), task_accuracy)
            lost[i] = {task: dense[task] - accuracy for task, accuracy in accuracies.items()}
            if tick is not None:
                tick(i, None)
    measurements = [
        Measurement(
            **{
                **_on_all_text(c, baseline),
                "block": row.point.block,
                "sync_point": row.point.sync_point,
                "strategy": row.strategy,
                "dropped": row.drops.blocks(row.point.sync_point),
                "task_accuracy_drop": task_drop,
            }
        )
        for c, row, task_drop in zip(comparisons[: len(rows)], rows, lost, strict=True)
    ]
    alone = comparisons[-1] if nothing else None
    return baseline.model_copy(update={"task_accuracy": dense}), measurements, alone


def _on_all_text(c: Comparison, baseline: Baseline) -> dict:
    """Return the fields of a comparison, its perplexity carried over to the baseline's text where it saw less of it."""
    if c.tokens == baseline.tokens:
        return vars(c)
    return {**vars(c), "ppl": max(1.0, baseline.ppl * (1 + c.ppl_increase)), "stopped_early": True}
