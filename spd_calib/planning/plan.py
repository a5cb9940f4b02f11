"""The plan file: what was chosen, why, what was predicted, and what the whole measures on held-out text."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from spd_calib.formats.common import Provenance
from spd_calib.formats.drops import NOTHING_DROPPED, Drops, Point, Strategy
from spd_calib.formats.plan import (
    Budget,
    CompensationFile,
    Plan,
    PlannedBlock,
    Predicted,
    RouterPredictor,
    Verified,
    requirements,
)
from spd_calib.formats.profile import Comparison, Cost, Profile

from .baselines import Baselines
from .candidates import Candidate, candidates, drops_of, tier
from .replication import Replicated, without
from .search import Choice, choose
from .sync_bits import Limit, choose_within
from .whole_plans import Calibration, HeldOut

Recovery = Literal["distillation", "grouping+distillation"]
RECOVERY: dict[str, Recovery] = {"sensitive": "distillation", "extremely sensitive": "grouping+distillation"}


@dataclass(frozen=True)
class Planned:
    """A plan, the choice behind it, and, by name, what it and the baselines of its size cost (calibration text)."""

    plan: Plan
    choice: Choice
    compared: Mapping[str, Comparison]


def make_plan(
    profile: Profile,
    budget: Budget,
    *,
    calibration: Calibration,
    held_out: HeldOut[Drops],
    module_paths: Sequence[str],
    mixtures: Collection[int] = (),
    provenance: Provenance,
    compare: bool = False,
    recovered: Plan | None = None,
    predictors: CompensationFile | None = None,
    quantised: Drops = NOTHING_DROPPED,
    replicated: Replicated = Replicated(),
    limit: Limit | None = None,
) -> Planned:
    """Choose what to drop within `budget`, verify it, and write down the plan.

    `module_paths` names the decoder layers of the model, `mixtures` those blocks that are mixtures of experts. With
    `compare` the baseline sets of the same size are measured as well, and may be chosen. Where the profile is of a
    checkpoint that `recover` wrote, `recovered` is its own plan, and `predictors` the file of its predictors, if any,
    that will lie beside the new plan. `quantised` are the syncs that have bits where they are kept; whatever
    `calibration` and `held_out` measure has them, too, and the blocks `replicated`, which are dropped in any case. With
    `limit` every sync point is treated so that it is kept to. Raises SpdError where the budget cannot be met.
    """
    of_all, whole = profile, budget
    if replicated.drops:
        profile = without(profile, replicated.drops)
        if budget.kind == "drop":
            budget = budget.model_copy(update={"value": max(0.0, budget.value - len(replicated.drops))})
    found = candidates(profile, budget)
    baselines = Baselines(drops_of(found), calibration) if compare else None
    if limit is not None:
        choice = choose_within(
            profile, budget, limit, num_blocks=len(module_paths), calibration=calibration, verify=held_out.verify
        )
    else:
        choice = choose(
            profile,
            budget,
            calibration=calibration,
            verify=held_out.verify,
            baselines=baselines,
            at_least=0 if replicated.drops else 1,
        )
    blocks = planned_blocks(
        of_all,
        whole,
        choice=choice,
        module_paths=module_paths,
        mixtures=mixtures,
        recovered=recovered,
        quantised=quantised,
        replicated=replicated,
        limited=limit is not None,
    )
    of_others = calibration.cost_of(NOTHING_DROPPED) if quantised or replicated.drops else None
    number, text = held_out.after(choice.rounds)
    reused = held_out.reused(choice.rounds)
    plan = Plan(
        model=profile.model,
        tensor_parallel=profile.tensor_parallel,
        requires=requirements(blocks),
        compensation=predictors,
        recovered_from=recovered.recovered_from if recovered else None,
        blocks=blocks,
        budget=whole,
        predicted=_predicted(
            profile,
            [c for c in found if c.point in choice.drops],
            kl=choice.predicted_kl,
            of_others=of_others,
            only_kl=limit is not None,
        ),
        verified=Verified(**vars(choice.verified), text=text.ref, reused=reused, round=number),
        provenance=provenance,
    )
    return Planned(plan, choice, baselines.compare(choice.drops) if baselines else {})


def planned_blocks(
    profile: Profile,
    budget: Budget,
    *,
    choice: Choice,
    module_paths: Sequence[str],
    mixtures: Collection[int],
    recovered: Plan | None = None,
    quantised: Drops = NOTHING_DROPPED,
    replicated: Replicated = Replicated(),
    limited: bool = False,
) -> list[PlannedBlock]:
    """Return every block of the plan; what the plan of a `recovered` checkpoint drops stays dropped.

    `limited`: each sync point was treated so that all keep to a limit, which is no budget of a loss.
    """
    settled = recovered.drops if recovered else NOTHING_DROPPED
    drops = quantised | settled | replicated.drops | choice.drops
    by_point = {c.point: c for c in candidates(profile, budget)}
    blocks = []
    for index, module in enumerate(module_paths):
        attention, mlp = Point(index, "attention"), Point(index, "mlp")
        own = [by_point[point] for point in (attention, mlp) if point in by_point]
        old = recovered.blocks[index] if recovered else None
        reasons = [old.reason] if old and (attention in settled or mlp in settled) else []
        reasons += [
            _reason(c, profile, budget, drops=choice.drops, replicated=replicated, limited=limited)
            for c in own
            if c.point not in choice.reasons
        ]
        reasons += [
            f"{'MLP: ' if point == mlp else ''}{choice.reasons[point]}"
            for point in (attention, mlp)
            if point in choice.reasons
        ]
        kl = {c.point: c.kl for c in own}
        blocks.append(
            PlannedBlock(
                index=index,
                module=module,
                strategy=drops.strategy(attention),
                mlp_strategy=drops.strategy(mlp),  # type: ignore[arg-type]  # Drops allows no other
                sync_bits=drops.at(attention).bits,  # type: ignore[arg-type]
                mlp_sync_bits=drops.at(mlp).bits,  # type: ignore[arg-type]
                replicated=drops.at(attention).replicated,
                recovery=_recovery(own, profile, budget, drops=drops),
                compensation=old.compensation if old else None,
                mlp_compensation=old.mlp_compensation if old else None,
                router=_router(old, drops.strategy(attention)) if index in mixtures else None,
                kl=kl.get(attention),
                mlp_kl=kl.get(mlp),
                reason="; ".join(reasons) or "not profiled",
            )
        )
    return blocks


def _router(old: PlannedBlock | None, strategy: Strategy) -> RouterPredictor | None:
    """Return what a mixture's router reads: as in the plan of a recovered checkpoint, or the shared stream alone."""
    if strategy != Strategy.BLOCK_DROP:
        return None
    return old.router if old and old.router else RouterPredictor(kind="zero", rank=0)


def _reason(
    candidate: Candidate, profile: Profile, budget: Budget, *, drops: Drops, replicated: Replicated, limited: bool
) -> str:
    """Return why a candidate is among `drops`, or is not."""
    if candidate.point in replicated.drops:
        return replicated.reasons[candidate.point.block]
    prefix = "MLP: " if candidate.point.sync_point == "mlp" else ""
    if candidate.point in drops:
        return f"{prefix}{candidate.reason}"
    if budget.kind == "tau":
        found = tier(profile, budget, candidate)
        return f"{found}: kept until `spd-calib recover` treats it ({RECOVERY[found]})"
    if limited:
        return f"{prefix}kept as it is: what else is dropped, or sent with fewer bits, saves enough"
    alone = _alone(candidate, profile, budget)
    why = "beyond the budget" if alone is not None and alone > budget.value else "and the budget has no room for it"
    return f"{prefix}{candidate.strategy} costs KL {candidate.kl:.3g}, {why}"


def _alone(candidate: Candidate, profile: Profile, budget: Budget) -> float | None:
    """Return what a candidate costs alone by the profile, in the budget's unit; None where the profile does not say."""
    costs: dict[str, Cost] = {"max_kl": "kl", "max_ppl_increase": "ppl", "max_accuracy_drop": "top1_accuracy"}
    metric = costs.get(budget.kind)
    if metric is None or budget.tasks or (profile.fisher is not None and metric != "kl"):
        return None
    lost = _total(profile, [candidate], metric)
    return lost / profile.baseline.ppl if metric == "ppl" else lost


def _recovery(own: Sequence[Candidate], profile: Profile, budget: Budget, *, drops: Drops) -> Recovery | None:
    """Return the treatment that the paper's rule asks for before the block, whose candidates these are, is dropped."""
    if budget.kind != "tau":
        return None
    return next((RECOVERY[tier(profile, budget, c)] for c in own if c.point not in drops), None)


def _predicted(
    profile: Profile, dropped: Sequence[Candidate], *, kl: float, of_others: Comparison | None, only_kl: bool
) -> Predicted:
    """Return what the profile says of dropping these candidates: their KL as given, and sums of single costs.

    What the model costs without them is added: `of_others`, where there are any (quantised syncs, blocks with heads
    replicated), or else what a recovered checkpoint costs alone. `of_others` has that in it, and so has `kl`.
    `only_kl`: the planner chose bits, of which no more than that is known.
    """
    alone = profile.recovered.alone if profile.recovered else None
    if of_others is not None:
        kl += of_others.kl - (alone.kl if alone else 0.0)
    if profile.fisher is not None or only_kl:
        return Predicted(kl=kl)
    ppl = _total(profile, dropped, "ppl") / profile.baseline.ppl
    accuracy = _total(profile, dropped, "top1_accuracy")
    if base := of_others or alone:
        ppl, accuracy = ppl + base.ppl_increase, accuracy + base.accuracy_drop
    return Predicted(kl=kl, ppl_increase=ppl, accuracy_drop=accuracy)


def _total(profile: Profile, dropped: Sequence[Candidate], metric: Cost) -> float:
    costs = [profile.sensitivity(c.strategy, metric, c.point.sync_point)[c.point.block] for c in dropped]
    return sum(costs)
