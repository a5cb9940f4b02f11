"""Budgets: what a measured plan spends of one, and whether it keeps it."""

import math

from spd_calib.formats.plan import Budget
from spd_calib.formats.profile import Comparison

MARGIN = 2.0  # standard errors between what a plan costs on the calibration text and its budget


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
    """Say whether a measured plan keeps its budget; numbers of drops and the paper's thresholds are always kept.

    With `certain` it must do so with MARGIN standard errors to spare, so that other text of the kind will agree.
    """
    if budget.each_text:
        return all(kept(_on_one(budget), one, certain=certain) for one in measured.per_text)
    spare = MARGIN * stderr(budget, measured) if certain else 0.0
    return budget.kind in ("drop", "tau") or cost(budget, measured) + spare <= budget.value


def stderr(budget: Budget, measured: Comparison) -> float:
    """Return the standard error of `cost` over sequences, or documents; 0 for a largest difference, which has none."""
    if budget.each_text:
        return stderr(_on_one(budget), max(measured.per_text, key=lambda one: cost(_on_one(budget), one)))
    if budget.tasks:
        return math.hypot(*measured.task_accuracy_drop_stderr.values()) / len(measured.task_accuracy_drop_stderr)
    return {
        "max_ppl_increase": (1 + measured.ppl_increase) * measured.nll_increase_stderr,
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
        "min_speedup": f"a step {100 * v:.3g} % shorter",
        "drop": f"{v:.0f} sync points dropped",
        "tau": f"tau1 {v:.4g}, tau2 {budget.tau2 or 0:.4g}",
    }[budget.kind]
