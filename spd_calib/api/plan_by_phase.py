"""From a profile, a budget and a request to a plan with one choice for both phases, or one for each."""

from collections.abc import Mapping, Sequence
from functools import partial

from spd_calib.errors import InputError
from spd_calib.formats.drops import BITS
from spd_calib.formats.phases import ByPhase, Phase
from spd_calib.formats.plan import Budget, Plan
from spd_calib.formats.profile import Profile
from spd_calib.parallel.session import Session
from spd_calib.planning.budget_options import BudgetOptions
from spd_calib.planning.latency import LatencyModel
from spd_calib.planning.plan_by_phase import make_plan_by_phase
from spd_calib.planning.sync_bits import ANY_BITS
from spd_calib.planning.two_phases import WORTH, RequestModel
from spd_calib.planning.whole_plans import HeldOut, measure_plans_served, part_of
from spd_calib.sensitivity.measure import Subject
from spd_calib.sensitivity.text import Text

from .options import RunOptions
from .progress import Progress
from .provenance import provenance
from .text import verification_rounds


def check_request(asked: BudgetOptions, *, phase: Phase, others: bool) -> None:
    """Raise InputError where a plan for a request (`new_tokens`) is asked for with what does not go with it.

    `others` says whether tasks, baselines or replicated heads are asked for.
    """
    if asked.max_kl is None and asked.min_speedup is None:
        raise InputError("`new_tokens` plans for a request, within `max_kl` or `min_speedup`; give one of these.")
    if asked.each_text or others:
        raise InputError(
            "`new_tokens` plans for a request as it is served: leave `tasks`, `each_text`, `compare`, `replicate` out."
        )
    if phase != "decode":
        raise InputError("`new_tokens` plans for both phases: leave `phase` out.")


def check_can_be_served(profile: Profile, subject: Subject) -> None:
    """Raise InputError for a model whose plans need predictors, which a plan with two choices cannot hold."""
    if profile.recovered is not None:
        raise InputError("`new_tokens` plans for a dense model, and this checkpoint is recovered: leave it out.")
    if any(b.attention_out_norm is not None or b.mlp_out_norm is not None for b in subject.lm.blocks):
        raise InputError(
            "This model's branches go through a norm, so its plans hold predictors, which a plan with a choice for "
            "each phase cannot: leave `new_tokens` out."
        )


def plan_by_phase(
    profile: Profile,
    budget: Budget,
    *,
    models: Mapping[Phase, LatencyModel],
    new_tokens: int,
    sync_bits: int | str | None,
    session: Session,
    subject: Subject,
    texts: Sequence[Text],
    run: RunOptions,
    progress: Progress,
) -> Plan:
    """Return the plan for a request of as many tokens as `models` have, and `new_tokens` behind them.

    `progress` is told what two choices would save beside one. Raises as make_plan_by_phase.
    """
    bits: Sequence[int | None] = (None, *BITS) if sync_bits == ANY_BITS else (sync_bits,)  # type: ignore[assignment]
    measure = partial(
        measure_plans_served,
        subject=subject,
        batch_size=run.batch_size,
        expect=progress.expect,
        tick=progress.measured,
    )
    held_out: HeldOut[ByPhase] = HeldOut(verification_rounds(session, texts), measure=measure)
    made = make_plan_by_phase(
        profile,
        budget,
        RequestModel(models, new_tokens),
        bits=bits,
        measure=partial(measure, texts=[text.calibration for text in texts]),
        race=partial(measure, texts=[part_of(text.calibration) for text in texts]),
        held_out=held_out,
        module_paths=subject.lm.module_paths,
        mixtures=subject.lm.mixtures,
        provenance=provenance(run),
    )
    assert made.request is not None
    beside = 100 * (1 - made.request.two_choices_seconds / made.request.one_choice_seconds)
    verdict = "so there are two" if made.in_two_phases else f"less than {100 * WORTH:.0f} %, so one serves both phases"
    if beside >= 100 * WORTH or not made.in_two_phases:
        progress.say(f"a choice for each phase can save {beside:.1f} % of the request's time beside one: {verdict}")
    return made
