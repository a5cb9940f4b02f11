"""The planned model against the dense one on lm-eval tasks: both scores, and their paired difference.

Both run on the same loaded model and the same requests, so that document by document only the sync points differ:
the difference's standard error is the paired one, far below that of either score.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from spd_calib.errors import InputError
from spd_calib.formats.drops import NOTHING_DROPPED, Drops
from spd_calib.formats.results import TaskResult
from spd_calib.parallel.model import TensorParallelLM

from .tasks import load_tasks, quiet, running, seeded, watching_truncation

Note = Callable[[str], None]  # told, in words, how far a run is
Key = tuple[str, str]  # task or group, metric


@dataclass(frozen=True)
class Score:
    """One metric of one task. `by_document` where the score is their mean; `parts` where it is one of groups."""

    value: float
    higher_is_better: bool
    documents: int
    by_document: Mapping[int, float] | None = None
    parts: Mapping[Key, float] | None = None  # weight of every task's score


class TaskSuite:
    """lm-eval tasks, loaded once, to be run on many models or many settings of one.

    `truncated` tells, after a run, whether requests were too long for the model and lost their beginning. Raises
    InputError for tasks that cannot be found, reached or run: see `load_tasks`.
    """

    def __init__(
        self, tasks: Sequence[str], include_path: Path | None, limit: int | None, seed: int, half: int | None = None
    ):
        self.limit, self.seed, self.truncated = limit, seed, False
        self.loaded = load_tasks(tasks, include_path, limit, seed, half)
        self.documents = self.loaded.pop("documents") or None
        self.requests = sum(i.repeats for task in self.loaded["tasks"].values() for i in task.instances)

    def run(
        self,
        lm: TensorParallelLM,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        note: Note = lambda words: None,
    ) -> dict[Key, Score]:
        """Every score of every task, then of every group, of `lm` under what it runs at the moment."""
        from lm_eval.evaluator import evaluate as lm_eval
        from lm_eval.models.huggingface import HFLM

        done = 0

        def step() -> None:
            nonlocal done
            done += 1
            note(f"{done} of {max(done, self.requests)} requests")

        for task in self.loaded["tasks"].values():
            for instance in task.instances:
                instance.resps, instance.filtered_resps = [], {}
        tasks = list(self.loaded["tasks"])
        numbers = lm.refusing_nonfinite()
        with running(tasks), numbers, quiet(step), seeded(self.seed), watching_truncation() as warnings:
            # log-probabilities in float32 whatever the model's dtype: rounded to bfloat16, answers would tie by chance
            model = HFLM(pretrained=lm.model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32")
            which = {"samples": self.documents} if self.documents else {"limit": self.limit}
            found: Any = lm_eval(model, self.loaded, **which, bootstrap_iters=0, log_samples=True)
        self.truncated = bool(warnings)
        scores: dict[Key, Score] = {}
        for name, task in self.loaded["tasks"].items():
            scores.update(_task_scores(name, task, found))
        for name, group in self.loaded["groups"].items():
            scores.update(_group_scores(name, group, found))
        return scores

    def evaluate(
        self,
        lm: TensorParallelLM,
        tokenizer: PreTrainedTokenizerBase,
        drops: Drops,
        batch_size: int,
        note: Note = lambda words: None,
        dense_lm: TensorParallelLM | None = None,
    ) -> list[TaskResult]:
        """Run the dense model and `lm` under `drops`; every score of every task, then of groups.

        Where `lm` was recovered, `dense_lm` is the model it was made from; else it is `lm` with every sync point kept.
        `note` is told how far it is. Raises InputError where lm-eval fails, or nothing of the tasks can be compared.
        """
        original = dense_lm or lm
        with original.running(NOTHING_DROPPED):
            dense = self.run(original, tokenizer, batch_size, lambda words: note(f"dense, {words}"))
        with lm.running(drops):
            planned = self.run(lm, tokenizer, batch_size, lambda words: note(f"planned, {words}"))
        if results := compare(dense, planned):
            return results
        names = ", ".join(self.loaded["tasks"])
        raise InputError(f"No metric of {names} says whether more of it is better; name other tasks.")

    def accuracy(self, lm: TensorParallelLM, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> dict[str, float]:
        """Accuracy by task of `lm` under what it runs now: acc, or else the first metric of which more is better.

        Raises InputError for a task without one.
        """
        return {task: score.value for task, score in self._accuracies(lm, tokenizer, batch_size).items()}

    def losing(
        self, lm: TensorParallelLM, dense: TensorParallelLM, tokenizer: PreTrainedTokenizerBase, batch_size: int
    ) -> Callable[[], tuple[dict[str, float], dict[str, float]]]:
        """What tells, by task, the accuracy (as above) that `lm` under what it runs then has lost, and its stderr.

        Against `dense` with every sync point kept, which is run once; paired, over documents.
        """
        before: dict[str, Score] = {}

        def lost() -> tuple[dict[str, float], dict[str, float]]:
            planned = self._accuracies(lm, tokenizer, batch_size)
            if not before:
                with dense.running(NOTHING_DROPPED):
                    before.update(self._accuracies(dense, tokenizer, batch_size))
            errors: dict[str, float] = {}
            for task, score in planned.items():
                if (error := _paired_stderr(before[task], score)) is None:
                    raise InputError(f"The score of {task} is no mean over documents; leave it out of tasks.")
                errors[task] = error
            return {task: before[task].value - score.value for task, score in planned.items()}, errors

        return lost

    def _accuracies(
        self, lm: TensorParallelLM, tokenizer: PreTrainedTokenizerBase, batch_size: int
    ) -> dict[str, Score]:
        scores = self.run(lm, tokenizer, batch_size)
        accuracy: dict[str, Score] = {}
        for task in self.loaded["tasks"]:
            better = {metric: s for (name, metric), s in scores.items() if name == task and s.higher_is_better}
            if not better:
                raise InputError(f"The task {task} has no accuracy or other score to lose; leave it out of tasks.")
            accuracy[task] = better.get("acc", next(iter(better.values())))
        return accuracy


def compare(dense: Mapping[Key, Score], planned: Mapping[Key, Score]) -> list[TaskResult]:
    """Differences, planned - dense, with paired standard errors, of every metric that both have a value of.

    Raises InputError where the dense model has a finite score and the planned one has not.
    """
    errors: dict[Key, float | None] = {}
    results: list[TaskResult] = []
    for key in [key for key in dense if key in planned]:
        d, p = dense[key], planned[key]
        errors[key] = _paired_stderr(d, p) if d.parts is None else _group_stderr(d.parts, errors)
        if not math.isfinite(d.value):
            continue
        if not math.isfinite(p.value):
            raise InputError(f"The {key[1]} of {key[0]} is {p.value} under this plan: it breaks the model; drop less.")
        results.append(
            TaskResult(
                task=key[0],
                metric=key[1],
                higher_is_better=d.higher_is_better,
                dense=d.value,
                planned=p.value,
                difference=p.value - d.value,
                difference_stderr=errors[key],
                documents=d.documents,
            )
        )
    return results


def _paired_stderr(dense: Score, planned: Score) -> float | None:
    """sd(planned_i - dense_i) / sqrt(n) over documents; None for one alone, or where the score is not their mean."""
    before, after = dense.by_document, planned.by_document
    if before is None or after is None or before.keys() != after.keys() or len(before) < 2:
        return None
    differences = [after[i] - before[i] for i in before]
    n = len(differences)
    mean = math.fsum(differences) / n
    return math.sqrt(math.fsum((x - mean) ** 2 for x in differences) / (n - 1) / n)


def _group_stderr(parts: Mapping[Key, float], errors: Mapping[Key, float | None]) -> float | None:
    """Of a weighted sum of scores on different documents, hence independent; None where one of theirs is."""
    found = [(weight, errors.get(key)) for key, weight in parts.items()]
    if any(error is None for _, error in found):
        return None
    return math.sqrt(math.fsum((weight * error) ** 2 for weight, error in found if error is not None))


def _task_scores(name: str, task: Any, found: Any) -> dict[Key, Score]:
    """A task's scores out of what lm-eval's evaluate() returns."""
    from lm_eval.api.metrics import mean

    scores: dict[Key, Score] = {}
    for field, value in found["results"][name].items():
        metric, _, filter_name = field.partition(",")
        better = found["higher_is_better"][name].get(metric)
        if not filter_name or metric.endswith("_stderr") or better is None or not _is_number(value):
            continue
        samples = [s for s in found["samples"][name] if s["filter"] == filter_name and metric in s["metrics"]]
        averaged = task.aggregation().get(metric, mean) is mean and all(_is_number(s[metric]) for s in samples)
        by_document = {s["doc_id"]: float(s[metric]) for s in samples} if averaged else None
        scores[name, _metric(field)] = Score(float(value), bool(better), len(samples), by_document)
    return scores


def _group_scores(name: str, group: Any, found: Any) -> dict[Key, Score]:
    """Scores that a group aggregates from its tasks': a weighted mean, by documents where it says so."""
    scores: dict[Key, Score] = {}
    results = found["results"]
    weighted = {a.metric: a.weight_by_size for a in group.aggregate_metric_list or []}
    for field, value in results[name].items():
        metric, _, filter_name = field.partition(",")
        better = found["higher_is_better"].get(name, {}).get(metric)
        if not filter_name or metric not in weighted or better is None or not _is_number(value):
            continue
        sizes = {t.task_name: results[t.task_name]["sample_len"] for t in group.get_all_tasks()}
        sizes = {task: size for task, size in sizes.items() if field in results[task]}
        total = sum(sizes.values())
        parts = {
            (task, _metric(field)): size / total if weighted[metric] else 1 / len(sizes) for task, size in sizes.items()
        }
        scores[name, _metric(field)] = Score(float(value), bool(better), total, parts=parts)
    return scores


def _metric(field: str) -> str:
    """lm-eval's "acc,none" is acc; the name of any other filter stays, as in exact_match,strict-match."""
    return field.removesuffix(",none")


def _is_number(value: object) -> bool:
    import numpy as np

    return isinstance(value, int | float | np.integer | np.floating | np.bool_)
