"""The latency model that a plan is made with: of the machine that the caller names, for decode and prefill."""

from dataclasses import dataclass

from spd_calib.errors import InputError
from spd_calib.formats.hardware import Hardware
from spd_calib.formats.phases import PHASES, Phase
from spd_calib.formats.plan import Plan
from spd_calib.parallel.session import Session, check_same_model
from spd_calib.planning.latency import LatencyModel, Step
from spd_calib.planning.machine_latency import ITEMSIZE, as_measured, held_against, on_machine
from spd_calib.planning.machine_tables import load
from spd_calib.planning.model_sizes import NOTHING_ADDED, Added, ModelSizes, added_by

from .progress import SILENT, Progress

CONTEXT = 2048  # tokens, or all that the model can read


@dataclass(frozen=True)
class LatencyOptions:
    """Names the machine, and the steps on it, that a plan's latency is modelled for.

    `hardware` is the path of a hardware.json or of a CSV, or the name of a table that ships, such as 'h100-nvlink'.
    `phase` is the one that min_speedup is about. `batch` sequences (default: 1) of `context` tokens (default: 2048, or
    the model's limit) make a step; of a hardware.json they name one that was timed (default: the first). With
    `new_tokens` a whole request is planned for, a prompt of `context` tokens and so many behind it, the first of
    which prefill gives: prefill and decoding may then have a choice each. Raises InputError for a phase that is
    neither.
    """

    hardware: str
    phase: Phase = "decode"
    batch: int | None = None
    context: int | None = None
    new_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise InputError(f"`phase` {self.phase!r} is neither decode nor prefill.")


def latency_options(
    hardware: str | None,
    *,
    phase: str = "decode",
    batch: int | None = None,
    context: int | None = None,
    new_tokens: int | None = None,
) -> LatencyOptions | None:
    """Return the options, or None where no hardware is named. Raises InputError where a step is asked for without."""
    if hardware is None and (batch or context or new_tokens):
        raise InputError(
            "`batch`, `context` and `new_tokens` need `hardware`: a hardware.json, a CSV or a table's name."
        )
    options = LatencyOptions(hardware or "", phase, batch, context, new_tokens)  # type: ignore[arg-type]  # which checks the phase
    return options if hardware else None


def latency_models(
    session: Session,
    options: LatencyOptions,
    *,
    recovered: Plan | None = None,
    replicated: Added = NOTHING_ADDED,
    progress: Progress = SILENT,
) -> dict[Phase, LatencyModel]:
    """Return the latency model by phase, decode first; `progress` is told its ceiling, and how it fits what was timed.

    `recovered` is the plan whose predictors and heads a plan of the session's checkpoint takes over, `replicated` what
    further heads add. Raises InputError where the hardware is of another model or number of ranks, or other steps are
    asked for than it holds.
    """
    sizes = sizes_of(session)
    added = replicated + (added_by(recovered, sizes) if recovered else NOTHING_ADDED)
    found = load(options.hardware)
    if isinstance(found, Hardware):
        _check_fits(found, session, options=options)
        models = {
            phase: as_measured(
                found,
                sizes,
                phase=phase,
                name=options.hardware,
                batch=options.batch,
                context=options.context,
                added=added,
            )
            for phase in PHASES
        }
        _say_held_against(found, models, progress=progress)
    else:
        context = options.context or min(CONTEXT, session.max_length)
        steps = [Step(phase, options.batch or 1, context, ITEMSIZE["bfloat16"]) for phase in PHASES]
        models = {s.phase: on_machine(found, sizes, tp=session.tp, step=s, added=added) for s in steps}
    for phase, m in models.items():
        progress.say(
            f"ceiling, {phase}: dropping every sync point saves {100 * m.ceiling:.1f} % of a step, every attention's "
            f"{100 * m.saved(m.blocks):.1f} % ({m.hardware}, modelled)"
        )
    return models


def sizes_of(session: Session) -> ModelSizes:
    """Return the sizes of the session's model, of which no weight is read."""
    return ModelSizes.of(session.form())


def _check_fits(hardware: Hardware, session: Session, *, options: LatencyOptions) -> None:
    check_same_model(hardware.model, session.ref)
    if hardware.tensor_parallel.size != session.tp:
        raise InputError(
            f"{options.hardware} was measured with {hardware.tensor_parallel.size} ranks, the profile is for "
            f"{session.tp}."
        )


def _say_held_against(hardware: Hardware, models: dict[Phase, LatencyModel], *, progress: Progress) -> None:
    """Tell how the model fits the steps that `bench` timed with sync points dropped."""
    for phase, model in models.items():
        for dropped, (predicted, measured) in held_against(hardware, model).items():
            progress.say(
                f"the latency model against a measured step, {phase}, {dropped.replace('_', ' ')}: "
                f"{1e3 * predicted:.3f} ms predicted, {1e3 * measured:.3f} ms measured "
                f"({100 * (predicted / measured - 1):+.1f} %)"
            )
