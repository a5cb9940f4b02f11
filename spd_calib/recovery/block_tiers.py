"""The tiers of a plan's blocks (the paper's three), which say what recovery tries on each."""

from spd_calib.errors import InputError
from spd_calib.formats.common import Tier
from spd_calib.formats.drops import Drops, Point, Strategy
from spd_calib.formats.plan import Plan
from spd_calib.sensitivity.tiers import thresholds, tiers

PAPER: dict[str | None, Tier] = {
    None: "insensitive",
    "distillation": "sensitive",
    "grouping+distillation": "extremely sensitive",
}


def drops_to_recover(plan: Plan) -> Drops:
    """Return what the recovered model drops: the plan's drops, and the blocks that the plan keeps until treated."""
    waiting = [Point(b.index, "attention") for b in plan.blocks if b.recovery]
    return plan.drops | Drops.of(dict.fromkeys(waiting, Strategy.BLOCK_DROP))


def tiers_of(plan: Plan, *, tau1: float | None = None, tau2: float | None = None) -> tuple[dict[int, Tier], str]:
    """Return the tier of each block whose attention's sync point is dropped, and a sentence on where it comes from.

    Of a plan that drops MLPs' alone, those blocks'. A plan made by the paper's rule holds the tiers; for any other, the
    block's own KL is compared with tau1 and tau2 (sensitivity.tiers). Raises InputError for a plan that drops nothing,
    or that was recovered before.
    """
    if plan.recovered_from is not None:
        raise InputError(f"{plan.model.id} was recovered already; recover the plan it was made from instead.")
    drops = drops_to_recover(plan)
    attention = drops.blocks("attention")
    blocks = attention or drops.blocks("mlp")
    if not blocks:
        raise InputError("The plan drops nothing, so there is nothing to recover; raise its budget.")
    dropped = [plan.blocks[i] for i in blocks]
    if plan.budget.kind == "tau" and tau1 is None and tau2 is None:
        return {b.index: PAPER[b.recovery] for b in dropped}, (
            f"tiers by the plan's own thresholds, perplexity +{plan.budget.value:.4g} and +{plan.budget.tau2 or 0:.4g}"
        )
    own = {b.index: b.kl if attention else b.mlp_kl for b in dropped}
    kl = {index: float("inf") if value is None else value for index, value in own.items()}
    known = {index: value for index, value in kl.items() if value != float("inf")}
    low, high = thresholds(known, tau1, tau2)
    whence = "given" if tau1 is not None else "a quarter of the dropped blocks' mean KL, and the mean"
    return tiers(kl, low, high), f"tiers by each block's own KL, thresholds {low:.4g} and {high:.4g} ({whence})"
