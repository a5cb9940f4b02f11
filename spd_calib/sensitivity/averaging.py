"""Several calibration texts: each is measured by itself; what is ranked and budgeted is the mean over the texts.

A text counts as one, however long it is (a macro average), and its own results are kept beside the mean.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

from spd_calib.formats.common import TextRef
from spd_calib.formats.profile import Baseline, Comparison, Fisher, Measurement


def joint_ref(refs: Sequence[TextRef]) -> TextRef:
    """Return one reference for all of `refs`, which are its `parts`; a single one is returned unchanged."""
    if len(refs) == 1:
        return refs[0]
    return TextRef(
        source=", ".join(r.source for r in refs),
        column=refs[0].column,
        seq_len=max(r.seq_len for r in refs),
        min_len=min(r.min_len for r in refs),
        pack=any(r.pack for r in refs),
        first=min(r.first for r in refs),
        sequences=sum(r.sequences for r in refs),
        tokens=sum(r.tokens for r in refs),
        sha256=hashlib.sha256("".join(r.sha256 for r in refs).encode()).hexdigest(),
        parts=list(refs),
    )


def average(each: Sequence[Comparison]) -> Comparison:
    """Return the mean of what one plan costs on each text; of a single text, what it costs there.

    The standard errors are those of the mean of independent texts (None where a text has none). Tokens and sequences
    are summed, the largest |delta log p| is the largest of all; lm-eval tasks, which belong to no text, are the first
    one's.
    """
    if len(each) == 1:
        return each[0]
    values: dict = {}
    for name in ("kl", "nll_increase", "ppl", "ppl_increase", "accuracy_drop", "top1_agreement"):
        values[name] = _mean([getattr(c, name) for c in each])
    for name in ("kl_stderr", "nll_increase_stderr", "accuracy_drop_stderr", "top1_agreement_stderr"):
        values[name] = _stderr([getattr(c, name) for c in each])
    routed = [c.routed_as_dense for c in each if c.routed_as_dense is not None]
    return Comparison(
        **values,
        routed_as_dense=_mean(routed) if len(routed) == len(each) else None,
        max_abs_logprob_diff=max(c.max_abs_logprob_diff for c in each),
        task_accuracy_drop=each[0].task_accuracy_drop,
        task_accuracy_drop_stderr=each[0].task_accuracy_drop_stderr,
        tokens=sum(c.tokens for c in each),
        sequences=sum(c.sequences for c in each),
        per_text=[Comparison(**{name: getattr(c, name) for name in Comparison.model_fields}) for c in each],
    )


def average_profile(each: Sequence[tuple[Baseline, list[Measurement]]]) -> tuple[Baseline, list[Measurement]]:
    """Return the mean over texts of a baseline and of the same experiments, in their order; see `average`."""
    if len(each) == 1:
        return each[0]
    rows = zip(*(measurements for _, measurements in each), strict=True)
    baseline = _average_baseline([baseline for baseline, _ in each])
    return baseline, [row[0].model_copy(update=dict(average(row))) for row in rows]


def average_fisher(each: Sequence[tuple[Baseline, Fisher]]) -> tuple[Baseline, Fisher]:
    """Return the mean over texts of a baseline and, entry by entry, of predictions for the same terms."""
    if len(each) == 1:
        return each[0]
    found = [fisher for _, fisher in each]
    errors = [fisher.stderr for fisher in found if fisher.stderr is not None]

    def entries(combine: Callable[[Sequence], Any], matrices: Sequence[list[list[float]]]) -> list:
        return [[combine(x) for x in zip(*rows, strict=True)] for rows in zip(*matrices, strict=True)]

    fisher = Fisher(
        terms=found[0].terms,
        matrix=entries(_mean, [f.matrix for f in found]),
        stderr=entries(_stderr, errors) if len(errors) == len(found) else None,
        samples=min(f.samples for f in found),
        sampling_error=max(f.sampling_error for f in found),
        per_text=found,
    )
    return _average_baseline([baseline for baseline, _ in each]), fisher


def _average_baseline(baselines: Sequence[Baseline]) -> Baseline:
    return Baseline(
        nll=_mean([b.nll for b in baselines]),
        ppl=_mean([b.ppl for b in baselines]),
        top1_accuracy=_mean([b.top1_accuracy for b in baselines]),
        tokens=sum(b.tokens for b in baselines),
        task_accuracy=baselines[0].task_accuracy,
        per_text=list(baselines),
    )


def _stderr(errors: Sequence[float | None]) -> float | None:
    """Return the standard error of the mean of independent values; None where that of one of them is not known."""
    known = [e for e in errors if e is not None]
    return math.hypot(*known) / len(known) if len(known) == len(errors) else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
