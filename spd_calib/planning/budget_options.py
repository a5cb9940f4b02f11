"""Budgets as people ask for them ('1%', '60%' of the sync points), turned into the one that a plan holds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from spd_calib.errors import InputError
from spd_calib.formats.drops import Strategy
from spd_calib.formats.plan import Budget
from spd_calib.formats.profile import Profile

from .candidates import candidates

Amount = float | str  # 0.01, '0.01' or '1%'
BUDGETS = (
    "max_kl", "max_ppl_increase", "max_accuracy_drop", "max_logprob_diff", "min_speedup", "max_bytes", "drop", "tau1"
)  # fmt: skip


@dataclass(frozen=True)
class BudgetOptions:
    """Exactly one budget (tau1 and tau2 go together), and what a plan within it may use.

    max_kl in nats per token; max_ppl_increase relative; max_accuracy_drop a fraction of next tokens or of lm-eval
    documents; max_logprob_diff in nats, of any token; min_speedup the share of a step's time to save; max_bytes the
    share of all syncs' bytes, at 16 bits a value, that may be sent; drop a number of sync points, or a share of those
    profiled; tau1 and tau2 the paper's thresholds in points of perplexity. `each_text`: the budget holds on each of the
    profile's texts, else on their mean. `strategies`: None for those that were profiled.
    """

    max_kl: Amount | None = None
    max_ppl_increase: Amount | None = None
    max_accuracy_drop: Amount | None = None
    max_logprob_diff: Amount | None = None
    min_speedup: Amount | None = None
    max_bytes: Amount | None = None
    drop: int | str | None = None
    tau1: float | None = None
    tau2: float | None = None
    each_text: bool = False
    strategies: Sequence[str] | None = None

    @property
    def amounts(self) -> dict[str, Any]:
        """Return every budget by its name; None where it was not asked for."""
        return {name: getattr(self, name) for name in BUDGETS}

    @property
    def nothing(self) -> bool:
        """Say whether no budget was asked for."""
        return self.tau2 is None and all(amount is None for amount in self.amounts.values())


def budget_for(profile: Profile, asked: BudgetOptions) -> Budget:
    """Return the one budget asked for. Raises InputError for none, two, or one that makes no sense for the profile."""
    kind, amount = _the_one(asked)
    if asked.each_text and (kind in ("drop", "tau1", "min_speedup", "max_bytes") or not profile.text.parts):
        raise InputError(
            "`each_text` needs a budget of a cost, such as `max_kl`, and a profile of several texts; leave it out."
        )
    strategies = strategies_for(profile, asked.strategies)
    if kind == "drop":
        return Budget(kind="drop", value=_drops_for(profile, amount, strategies), strategies=strategies)
    if kind == "tau1":
        if profile.recovered:
            raise InputError("`tau1` says what to recover, and this checkpoint is recovered; give another budget.")
        return Budget(kind="tau", value=float(amount), tau2=asked.tau2, strategies=strategies)
    value = fraction(amount, kind)
    return Budget(kind=kind, value=value, strategies=strategies, each_text=asked.each_text)  # type: ignore[arg-type]


def _the_one(asked: BudgetOptions) -> tuple[str, Any]:
    """Return the name of the one budget asked for, and its amount."""
    given = {kind: amount for kind, amount in asked.amounts.items() if amount is not None}
    if len(given) != 1:
        found = f"{' and '.join(map(_quoted, given))} are" if given else "none is"
        raise InputError(f"Give exactly one budget of {', '.join(map(_quoted, BUDGETS))}; {found} given.")
    if (asked.tau1 is None) != (asked.tau2 is None):
        raise InputError("`tau1` and `tau2` go together: the paper's rule has two thresholds.")
    for name, tau in (("tau1", asked.tau1), ("tau2", asked.tau2)):
        if tau is not None and not 0 <= tau < math.inf:
            raise InputError(f"`{name}` {tau} is no threshold; give points of perplexity, 0 or more.")
    if asked.tau1 is not None and asked.tau2 is not None and asked.tau2 < asked.tau1:
        raise InputError(f"`tau2` {asked.tau2} is below `tau1` {asked.tau1}; swap them.")
    return next(iter(given.items()))


def _quoted(name: str) -> str:
    return f"`{name}`"


def strategies_for(profile: Profile, names: Sequence[str] | None) -> list[Strategy]:
    """Return the strategies of these names, each once; None stands for those profiled.

    Raises InputError for a name that is none.
    """
    if wrong := [name for name in names or [] if name not in list(Strategy)]:
        raise InputError(f"The strategy {wrong[0]!r} is none of {', '.join(Strategy)}.")
    return list(dict.fromkeys(map(Strategy, names or profile.strategies)))


def _drops_for(profile: Profile, amount: int | str, strategies: list[Strategy]) -> int:
    """Return a number or a share of the sync points that plans from the profile can drop by these strategies."""
    available = len(candidates(profile, Budget(kind="drop", value=0, strategies=strategies)))
    what = "blocks" if profile.sync_points == ["attention"] else "sync points"
    settled = len(profile.settled)
    wanted = number_of_drops(amount, available + settled, what=what)
    if wanted < settled:
        raise InputError(f"`drop` {amount} is less than the {settled} {what} that the recovered checkpoint drops.")
    return wanted


def fraction(amount: Amount, name: str) -> float:
    """Return 0.01 for '1%', '0.01' or 0.01; `name` is what the amount was given as.

    Raises InputError for anything else, and for less than nothing.
    """
    text = str(amount)
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise InputError(f"`{name}` {text!r} is no budget; write a number such as 0.01, or 1%.")
    return value


def number_of_drops(amount: int | str, available: int, *, what: str = "blocks") -> int:
    """Return 5 for 5, '5' or '60%' (rounded to the nearest) of 8 `available`. Raises InputError beyond all of them."""
    text = str(amount)
    if text.endswith("%"):
        share = fraction(text, "drop")
        wanted = round(share * available) if share <= 1 else available + 1
    elif text.isdecimal():
        wanted = int(text)
    else:
        raise InputError(f"`drop` {text!r} is no number of {what}; write one such as 5, or a share such as 60%.")
    if wanted > available:
        raise InputError(f"`drop` {text} asks for more than the {available} {what} there are; ask for fewer.")
    return wanted
