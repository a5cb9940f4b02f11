"""The plan file: what was chosen, why, what was predicted, and what the whole measures on held-out text."""

from collections.abc import Sequence
from typing import Literal

from spd_calib.formats.common import Provenance, Strategy, TextRef
from spd_calib.formats.plan import Budget, Plan, PlannedBlock, Predicted, Verified
from spd_calib.formats.profile import Comparison, Profile
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.sensitivity.measure import Experiment, Tick, measure

from .search import Choice, Drops, candidates, choose, tier

RECOVERY: dict[str, Literal["distillation", "grouping+distillation"]] = {
    "sensitive": "distillation",
    "extremely sensitive": "grouping+distillation",
}


def make_plan(
    lm: TensorParallelLM,
    profile: Profile,
    budget: Budget,
    calibration: Sequence[Sequence[int]],
    verification: Sequence[Sequence[int]],
    verification_ref: TextRef,
    provenance: Provenance,
    batch_size: int = 8,
    tick: Tick = lambda experiment, tally: None,
) -> tuple[Plan, Choice]:
    """Choose, verify and, where needed, repair. Raises SpdError where the budget cannot be met."""

    def measured_on(sequences: Sequence[Sequence[int]]):
        return lambda drops: measure_plan(lm, drops, sequences, batch_size, tick)

    choice = choose(profile, budget, measured_on(calibration), measured_on(verification))
    plan = Plan(
        model=profile.model,
        tensor_parallel=profile.tensor_parallel,
        blocks=_blocks(lm.module_paths, profile, budget, choice),
        budget=budget,
        predicted=_predicted(profile, choice),
        verified=Verified(**vars(choice.verified), text=verification_ref),
        provenance=provenance,
    )
    return plan, choice


def measure_plan(
    lm: TensorParallelLM, drops: Drops, sequences: Sequence[Sequence[int]], batch_size: int, tick: Tick
) -> Comparison:
    """One whole plan against the dense model."""
    keep = Strategy.KEEP_SYNC
    attention = tuple(drops.get(i, keep) for i in range(lm.num_blocks))
    return measure(lm, sequences, [Experiment(attention, (keep,) * lm.num_blocks)], batch_size, tick)[1][0]


def _blocks(modules: Sequence[str], profile: Profile, budget: Budget, choice: Choice) -> list[PlannedBlock]:
    chosen = {c.block for c in choice.dropped}
    blocks = []
    for c in sorted(candidates(profile, budget), key=lambda c: c.block):
        recovery = None
        if c.block in chosen:
            strategy, reason = c.strategy, c.reason
        else:
            strategy, reason = Strategy.KEEP_SYNC, f"{c.strategy} costs KL {c.measurement.kl:.3g}, beyond the budget"
            if budget.kind == "tau":
                recovery = RECOVERY[tier(profile, budget, c)]
                reason = f"{tier(profile, budget, c)}: kept until `spd-calib recover` treats it ({recovery})"
        blocks.append(
            PlannedBlock(
                index=c.block,
                module=modules[c.block],
                strategy=strategy,
                recovery=recovery,
                kl=profile.sensitivity(c.strategy, "kl")[c.block],
                reason=reason,
            )
        )
    return blocks


def _predicted(profile: Profile, choice: Choice) -> Predicted:
    def total(metric) -> float:
        return sum(profile.sensitivity(c.strategy, metric)[c.block] for c in choice.dropped)

    return Predicted(kl=total("kl"), ppl_increase=total("ppl") / profile.baseline.ppl, accuracy_drop=total("accuracy"))
