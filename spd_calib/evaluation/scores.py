"""Scores out of what lm-eval returns, and the paired difference between the dense model's and the planned one's."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spd_calib.errors import InputError
from spd_calib.formats.results import TaskResult

Key = tuple[str, str]  # task or group, metric


@dataclass(frozen=True)
class Score:
    """One metric of one task. `by_document` where the score is their mean; `parts` where it is one of groups."""

    value: float
    higher_is_better: bool
    documents: int
    by_document: Mapping[int, float] | None = None
    parts: Mapping[Key, float] | None = None  # weight of every task's score


def compare(
    dense: Mapping[Key, Score], planned: Mapping[Key, Score], *, shown: Mapping[str, int] | None = None
) -> list[TaskResult]:
    """Return planned - dense, with its paired standard error, of every metric that both have a value of.

    `shown` is the number of few-shot examples by task, for the file.

    Raises InputError where the dense model has a finite score and the planned one has not.
    """
    errors: dict[Key, float | None] = {}
    results: list[TaskResult] = []
    for key in [key for key in dense if key in planned]:
        d, p = dense[key], planned[key]
        errors[key] = paired_stderr(d, p) if d.parts is None else _group_stderr(d.parts, errors)
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
                num_fewshot=(shown or {}).get(key[0]),
            )
        )
    return results


def paired_stderr(dense: Score, planned: Score) -> float | None:
    """Return sd(planned_i - dense_i) / sqrt(n) over n documents.

    None for one document alone, and where the score is not the mean over documents.
    """
    before, after = dense.by_document, planned.by_document
    if before is None or after is None or before.keys() != after.keys() or len(before) < 2:
        return None
    differences = [after[i] - before[i] for i in before]
    n = len(differences)
    mean = math.fsum(differences) / n
    return math.sqrt(math.fsum((x - mean) ** 2 for x in differences) / (n - 1) / n)


def _group_stderr(parts: Mapping[Key, float], errors: Mapping[Key, float | None]) -> float | None:
    """Return the standard error of a weighted sum of scores on different documents, hence independent.

    None where one of theirs is.
    """
    found = [(weight, errors.get(key)) for key, weight in parts.items()]
    if any(error is None for _, error in found):
        return None
    return math.sqrt(math.fsum((weight * error) ** 2 for weight, error in found if error is not None))


def task_scores(name: str, task: Any, *, found: Any) -> dict[Key, Score]:
    """Return a task's scores, by task and metric, out of what lm-eval's evaluate() returns."""
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


def group_scores(name: str, group: Any, *, found: Any) -> dict[Key, Score]:
    """Return the scores that a group aggregates from its tasks': a mean, weighted by documents where it says so."""
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
    """Return acc for lm-eval's "acc,none"; the name of any other filter stays, as in exact_match,strict-match."""
    return field.removesuffix(",none")


def _is_number(value: object) -> bool:
    import numpy as np

    return isinstance(value, int | float | np.integer | np.floating | np.bool_)
