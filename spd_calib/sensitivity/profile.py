"""The two ways of profiling: one sync point at a time, or the paper's, cumulatively from the last block backwards."""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from spd_calib.formats.common import Strategy
from spd_calib.formats.profile import Baseline, Measurement
from spd_calib.parallel.model import TensorParallelLM

from .measure import Experiment, Tick, measure

Method = Literal["single", "cumulative"]
TaskAccuracy = Callable[[], dict[str, float]]  # of the model as it is set at the moment, by lm-eval task


def drops(method: Method, strategies: Sequence[Strategy], num_blocks: int) -> Iterator[tuple[int, Strategy, list[int]]]:
    """(block, strategy, all blocks dropped) of every experiment of a profile.

    single: each block alone. cumulative: block b with all behind it, from the last block backwards, so that
    consecutive results differ by one block (paper, section 4.2; the differences are Profile.sensitivity's).
    """
    for strategy in strategies:
        if method == "single":
            yield from ((block, strategy, [block]) for block in range(num_blocks))
        else:
            yield from ((block, strategy, list(range(block, num_blocks))) for block in reversed(range(num_blocks)))


def profile(
    lm: TensorParallelLM,
    sequences: Sequence[Sequence[int]],
    method: Method,
    strategies: Sequence[Strategy],
    batch_size: int,
    tick: Tick,
    task_accuracy: TaskAccuracy | None = None,
) -> tuple[Baseline, list[Measurement]]:
    """Run every experiment of the profile; `task_accuracy` is called for the dense model and for each experiment."""
    plan = list(drops(method, strategies, lm.num_blocks))
    experiments = [Experiment.dropping(dropped, strategy, lm.num_blocks) for _, strategy, dropped in plan]
    baseline, comparisons = measure(lm, sequences, experiments, batch_size, tick)
    dense, lost = {}, [{} for _ in plan]  # type: dict[str, float], list[dict[str, float]]
    if task_accuracy is not None:
        dense = task_accuracy()
        for i, experiment in enumerate(experiments):
            lm.set_strategies(experiment.attention)
            lost[i] = {task: dense[task] - accuracy for task, accuracy in task_accuracy().items()}
            tick(i, None)
        lm.keep_all()
    measurements = [
        Measurement(**vars(c), block=block, strategy=strategy, dropped=dropped, task_accuracy_drop=task_drop)
        for c, (block, strategy, dropped), task_drop in zip(comparisons, plan, lost, strict=True)
    ]
    return baseline.model_copy(update={"task_accuracy": dense}), measurements
