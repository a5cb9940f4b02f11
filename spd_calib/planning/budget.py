"""Budgets: what a plan may cost, and what a measured plan does cost."""

import math

from spd_calib.errors import InputError
from spd_calib.formats.plan import Budget
from spd_calib.formats.profile import Comparison, Metric

OPTIONS = {
    "max_kl": "--max-kl",
    "max_ppl_increase": "--max-ppl-increase",
    "max_accuracy_drop": "--max-accuracy-drop",
    "max_logprob_diff": "--max-logprob-diff",
    "min_speedup": "--min-speedup",
    "drop": "--drop",
    "tau": "--tau1",
}
METRICS: dict[str, Metric] = {  # in which a budget ranks single drops; a number of drops: as the profile does
    "max_kl": "kl",
    "max_ppl_increase": "ppl",
    "max_accuracy_drop": "accuracy",
    "max_logprob_diff": "kl",
    "tau": "ppl",
}

MARGIN = 2.0  # standard errors between what a plan costs on the calibration text and its budget


def fraction(text: str, option: str) -> float:
    """'1%' or '0.01' to 0.01. Raises InputError for anything else, and for less than nothing."""
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise InputError(f"{option} {text!r} is no budget; write a number such as 0.01, or 1%.")
    return value


def blocks(text: str, available: int, what: str = "blocks") -> int:
    """'5' or '60%' (rounded to the nearest) to a number of `what`, of those available. Raises InputError beyond all."""
    if text.endswith("%"):
        share = fraction(text, "--drop")
        wanted = round(share * available) if share <= 1 else available + 1
    elif text.isdigit():
        wanted = int(text)
    else:
        raise InputError(f"--drop {text!r} is no number of {what}; write one such as 5, or a share such as 60%.")
    if wanted > available:
        raise InputError(f"--drop {text} asks for more than the {available} {what} there are; ask for fewer.")
    return wanted


def cost(budget: Budget, measured: Comparison) -> float:
    """What `measured` spends of the budget, in the budget's own unit; KL for the budgets that have none.

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


def kept(budget: Budget, measured: Comparison, certain: bool = False) -> bool:
    """Does a measured plan keep its budget? Numbers of drops and the paper's thresholds are kept by construction.

    With `certain` it must do so with MARGIN standard errors to spare: other text of the kind will agree.
    """
    if budget.each_text:
        return all(kept(_on_one(budget), one, certain) for one in measured.per_text)
    spare = MARGIN * stderr(budget, measured) if certain else 0.0
    return budget.kind in ("drop", "tau") or cost(budget, measured) + spare <= budget.value


def _on_one(budget: Budget) -> Budget:
    return budget.model_copy(update={"each_text": False})


def stderr(budget: Budget, measured: Comparison) -> float:
    """Standard error of `cost` over sequences, or documents; of a largest difference there is none."""
    if budget.each_text:
        return stderr(_on_one(budget), max(measured.per_text, key=lambda one: cost(_on_one(budget), one)))
    if budget.tasks:
        return math.hypot(*measured.task_accuracy_drop_stderr.values()) / len(measured.task_accuracy_drop_stderr)
    return {
        "max_ppl_increase": (1 + measured.ppl_increase) * measured.nll_increase_stderr,
        "max_accuracy_drop": measured.accuracy_drop_stderr,
        "max_logprob_diff": 0.0,
    }.get(budget.kind, measured.kl_stderr)


def describe(budget: Budget, value: float | None = None) -> str:
    """'KL 0.05', 'perplexity +1 %': the budget, or `value` in its unit."""
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
