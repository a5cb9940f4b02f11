"""The plan file of a request: one choice for both phases, or one for each, and why."""

from collections.abc import Collection, Sequence

from spd_calib.formats.common import Provenance
from spd_calib.formats.drops import Drops, Point
from spd_calib.formats.phases import ByPhase
from spd_calib.formats.plan import Budget, Plan, PlannedBlock, Predicted, Prefill, Verified, requirements
from spd_calib.formats.profile import Profile

from .plan import planned_blocks
from .search import Choice
from .two_phases import Measure, RequestModel, choose_by_phase, reasons_of, single_choices
from .whole_plans import HeldOut


def make_plan_by_phase(
    profile: Profile,
    budget: Budget,
    request: RequestModel,
    *,
    bits: Sequence[int | None],
    measure: Measure,
    race: Measure,
    held_out: HeldOut[ByPhase],
    module_paths: Sequence[str],
    mixtures: Collection[int] = (),
    provenance: Provenance,
) -> Plan:
    """Choose for a request what to drop in each phase within `budget`, verify it as served, and write down the plan.

    `bits` are those that syncs may have that are kept, None as they are. The other arguments are those of make_plan and
    choose_by_phase, which says what is raised.
    """
    choices = single_choices(profile, budget, bits=bits, num_blocks=len(module_paths))
    chosen = choose_by_phase(profile, budget, choices, request, measure=measure, race=race, verify=held_out.verify)
    choice = Choice(
        chosen.plan.decode,
        chosen.verified,
        chosen.predicted_kl,
        given_back=0,
        rounds=chosen.rounds,
        reasons=reasons_of(chosen.plan, request),
    )
    blocks = [
        _with_prefill(block, chosen.plan.prefill)
        for block in planned_blocks(profile, budget, choice=choice, module_paths=module_paths, mixtures=mixtures)
    ]
    number, text = held_out.after(chosen.rounds)
    reused = held_out.reused(chosen.rounds)
    return Plan(
        model=profile.model,
        tensor_parallel=profile.tensor_parallel,
        requires=requirements(blocks),
        blocks=blocks,
        budget=budget,
        predicted=Predicted(kl=chosen.predicted_kl),
        verified=Verified(**vars(chosen.verified), text=text.ref, as_served=True, reused=reused, round=number),
        request=request.request(chosen.plan, one=chosen.one, two=chosen.two),
        provenance=provenance,
    )


def _with_prefill(block: PlannedBlock, drops: Drops) -> PlannedBlock:
    """Return the block with what prefill drops, where that is not what decoding drops."""
    attention, mlp = (drops.at(Point(block.index, sublayer)) for sublayer in ("attention", "mlp"))
    prefill = Prefill(
        strategy=attention.strategy,
        mlp_strategy=mlp.strategy,  # type: ignore[arg-type]  # Drops allows no other
        sync_bits=attention.bits,  # type: ignore[arg-type]
        mlp_sync_bits=mlp.bits,  # type: ignore[arg-type]
    )
    return block if prefill.syncs == block.syncs else block.model_copy(update={"prefill": prefill})
