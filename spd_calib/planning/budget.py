"""Budgets: what a measured plan spends of one, and whether it keeps it."""

import math

from spd_calib.errors import InputError
from spd_calib.formats.plan import Budget
from spd_calib.formats.profile import Comparison, Profile

MARGIN = 2.0  # standard errors between what a plan costs on the calibration text and its budget
MANY_SEQUENCES = 30  # from which on the normal distribution stands for Student's
FEWEST_TO_CHOOSE, FEWEST_TO_VERIFY = 4, 2  # sequences of a text, for a plan within a bound on its cost


def cost(budget: Budget, measured: Comparison) -> float:
    """Return what `measured` spends of the budget, in the budget's own unit; KL for the budgets that have none.

    Of a budget to be kept on each text: on the one that costs most.
    """
    if budget.each_text:
        return max(cost(_on_one(budget), one) for one in measured.per_text)
    if budget.tasks:
        return sum(measured.task_accuracy_drop.values()) / len(measured.task_accuracy_drop)
    return {
        "max_ppl_increase": measured.ppl_increase,
        "max_accuracy_drop": measured.accuracy_drop,
        "max_logprob_diff": measured.max_abs_logprob_diff,
    }.get(budget.kind, measured.kl)


def kept(budget: Budget, measured: Comparison, *, certain: bool = False) -> bool:
    """Say whether a measured plan keeps its budget; numbers of drops or bytes and the paper's thresholds are kept.

    With `certain` it must do so with `spare` left over, so that other text of the kind will agree.
    """
    if budget.each_text:
        return all(kept(_on_one(budget), one, certain=certain) for one in measured.per_text)
    left_over = spare(budget, measured) if certain else 0.0
    return budget.kind in ("drop", "tau", "max_bytes") or cost(budget, measured) + left_over <= budget.value


def margin(sequences: int) -> float:
    """Return how many standard errors over `sequences` leave the same doubt as MARGIN of very many.

    MARGIN from MANY_SEQUENCES on; below, Student's t at the same one-sided probability; infinite for one sequence.
    """
    if sequences >= MANY_SEQUENCES:
        return MARGIN
    from scipy import stats

    return float(stats.t.isf(stats.norm.sf(MARGIN), sequences - 1)) if sequences > 1 else math.inf


def spare(budget: Budget, *measured: Comparison) -> float:
    """Return what must lie between the cost of one plan and its budget, or between the costs of two plans.

    In the budget's unit: as many standard errors (of the two, added in squares) as `margin` asks for. Infinite where
    one has none.
    """
    errors = [stderr(budget, one) for one in measured]
    known = [error for error in errors if error is not None]
    if len(known) < len(errors):
        return math.inf
    sequences = min(part.sequences for one in measured for part in one.per_text or [one])
    return math.hypot(*known) * (MARGIN if budget.tasks else margin(sequences)) if any(known) else 0.0


def check_enough_text(budget: Budget, profile: Profile) -> None:
    """Raise InputError where the profile's text has too few sequences to promise that a cost stays within `budget`.

    Of numbers of drops, largest differences and lm-eval tasks nothing is promised that rests on standard errors over
    sequences.
    """
    if budget.kind in ("drop", "tau", "min_speedup", "max_bytes", "max_logprob_diff") or budget.tasks:
        return
    for refs, fewest, what, parameter in (
        (profile.text.each, FEWEST_TO_CHOOSE, "measure on", "max_samples"),
        (profile.verify_text.each, FEWEST_TO_VERIFY, "verify on", "verify_samples"),
    ):
        if few := [text for text in refs if text.sequences < fewest]:
            raise InputError(
                f"A plan within {describe(budget)} wants {fewest} sequences to {what}, or more, since fewer tell no "
                f"standard error to rely on, and {few[0].source} has {few[0].sequences}; profile again with more text, "
                f"or a larger {parameter}."
            )


def stderr(budget: Budget, measured: Comparison) -> float | None:
    """Return the standard error of `cost` over sequences or documents: None of one; 0 of a largest difference."""
    if budget.each_text:
        return stderr(_on_one(budget), max(measured.per_text, key=lambda one: cost(_on_one(budget), one)))
    if budget.tasks:
        return math.hypot(*measured.task_accuracy_drop_stderr.values()) / len(measured.task_accuracy_drop_stderr)
    nll_stderr = measured.nll_increase_stderr
    return {
        "max_ppl_increase": None if nll_stderr is None else (1 + measured.ppl_increase) * nll_stderr,
        "max_accuracy_drop": measured.accuracy_drop_stderr,
        "max_logprob_diff": 0.0,
    }.get(budget.kind, measured.kl_stderr)


def _on_one(budget: Budget) -> Budget:
    return budget.model_copy(update={"each_text": False})


def describe(budget: Budget, value: float | None = None) -> str:
    """Return the budget in words, 'KL 0.05' or 'perplexity +1 %', or `value` in its unit."""
    v = budget.value if value is None else value
    return ("on each text, " if budget.each_text else "") + {
        "max_kl": f"KL {v:.4g}",
        "max_ppl_increase": f"perplexity {100 * v:+.3g} %",
        "max_accuracy_drop": f"accuracy {-100 * v:+.3g} points"
        + (f" on {', '.join(budget.tasks)}" if budget.tasks else ""),
        "max_logprob_diff": f"max |delta log p| {v:.4g}",
        "min_speedup": f"{100 * v:.3g} % of the time saved",
        "max_bytes": f"{100 * v:.3g} % of the syncs' bytes",
        "drop": f"{v:.0f} sync points dropped",
        "tau": f"tau1 {v:.4g}, tau2 {budget.tau2 or 0:.4g}",
    }[budget.kind]
