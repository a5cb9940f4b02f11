"""What `plan --hardware` adds: the latency model of decode and prefill, and what is printed of it."""

from spd_calib.errors import InputError
from spd_calib.formats.hardware import Hardware
from spd_calib.formats.plan import Plan
from spd_calib.models.load import skeleton
from spd_calib.parallel.session import Session, check_same_model
from spd_calib.planning.latency import (
    ITEMSIZE,
    LatencyModel,
    Phase,
    Shape,
    Step,
    as_measured,
    held_against,
    load,
    predictor_weights,
)
from spd_calib.planning.latency import on_machine as model_on

from .terminal import say, table

CONTEXT = 2048  # tokens, or all that the model can read
PHASES: tuple[Phase, Phase] = ("decode", "prefill")


def latency_models(
    session: Session, hardware: str, batch: int | None, context: int | None, recovered: Plan | None = None
) -> tuple[dict[str, LatencyModel], Hardware | None]:
    """By phase, decode first; and the hardware.json, where that is what `hardware` names.

    `recovered`: the plan whose predictors a plan of the session's checkpoint takes over.
    Raises InputError where it is of another model or number of ranks, or other steps are asked for than it holds.
    """
    shape = Shape.of(skeleton(session.source, session.config, dtype="bfloat16"))
    predictors = predictor_weights(recovered, shape) if recovered else 0
    found = load(hardware)
    if not isinstance(found, Hardware):
        context = context or min(CONTEXT, session.max_length)
        steps = [Step(phase, batch or 1, context, ITEMSIZE["bfloat16"]) for phase in PHASES]
        return {s.phase: model_on(found, shape, session.tp, s, predictors) for s in steps}, None
    check_same_model(found.model, session.ref)
    if found.tensor_parallel.size != session.tp:
        raise InputError(
            f"{hardware} was measured with {found.tensor_parallel.size} ranks, the profile is for {session.tp}."
        )
    models: dict[str, LatencyModel] = {
        phase: as_measured(found, shape, phase, hardware, predictors) for phase in PHASES
    }
    held = models["decode"].step
    if (batch or held.batch, context or held.context) != (held.batch, held.context):
        raise InputError(
            f"{hardware} holds steps of batch {held.batch} and {held.context} tokens; leave out --batch and --context, "
            "or bench others with --batch-size and --tokens."
        )
    return models, found


def print_held_against(models: dict[str, LatencyModel], hardware: Hardware) -> None:
    """The model against the steps that `bench` timed with sync points dropped."""
    table(
        "the latency model against the steps measured",
        ["phase", "sync points", "predicted, ms", "measured, ms", "error"],
        [
            [phase, blocks.replace("_", " "), f"{1e3 * p:.3f}", f"{1e3 * m:.3f}", f"{100 * (p / m - 1):+.1f} %"]
            for phase, model in models.items()
            for blocks, (p, m) in held_against(hardware, model).items()
        ],
        left=2,
    )


def say_ceiling(models: dict[str, LatencyModel]) -> None:
    """What dropping every sync point could save here."""
    for phase, m in models.items():
        say(
            f"ceiling, {phase}: dropping every sync point saves {100 * m.ceiling:.1f} % of a step, every attention's "
            f"{100 * m.saved(m.blocks):.1f} % ({m.hardware}, modelled)"
        )
