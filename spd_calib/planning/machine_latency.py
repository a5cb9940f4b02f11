"""The latency model of a machine: from its rates, or from the steps that `spd-calib bench` timed on it."""

from collections.abc import Mapping

from spd_calib.errors import InputError
from spd_calib.formats.hardware import Hardware
from spd_calib.formats.machine import Machine

from .latency import LatencyModel, Phase, Step
from .machine_tables import interpolate
from .model_sizes import NOTHING_ADDED, Added, ModelSizes, bytes_moved, flops

ATTAINED = 0.8  # of a data sheet's rates; assumed, not measured
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


def on_machine(
    machine: Machine, sizes: ModelSizes, *, tp: int, step: Step, added: Added = NOTHING_ADDED
) -> LatencyModel:
    """Return the latency model of `step` from a machine's rates; `added` is what a plan adds to it on a rank.

    Raises InputError for another number of ranks than its table is of.
    """
    if machine.ranks != tp:
        raise InputError(
            f"{machine.name} holds all-reduce times of {machine.ranks} ranks, not of {tp}, and how a link scales is "
            "not guessed; measure yours with `spd-calib bench`, or give a CSV of them."
        )
    dense = _busy(machine, sizes, tp=tp, step=step, added=NOTHING_ADDED)
    message = step.new_tokens * sizes.width * step.itemsize
    times = {r.bytes: r.seconds for r in machine.all_reduces}
    all_reduce = interpolate(times, message)
    fused = machine.fused_norm if machine.fused_norm and message <= machine.fused_norm.max_bytes else None
    return LatencyModel(
        hardware=machine.name,
        step=step,
        blocks=sizes.blocks,
        compute=dense,
        all_reduce=all_reduce,
        left=_left(times, sizes, message=message, fused=min(fused.left_seconds, all_reduce) if fused else 0.0),
        added=_busy(machine, sizes, tp=tp, step=step, added=added) - dense,
    )


def _left(times: Mapping[int, float], sizes: ModelSizes, *, message: int, fused: float = 0.0) -> float:
    """Return the seconds that a dropped sync point leaves: of a fused kernel `fused`, behind norms a wider message."""
    return interpolate(times, 2 * message) - interpolate(times, message) if sizes.side_by_side else fused


def _busy(machine: Machine, sizes: ModelSizes, *, tp: int, step: Step, added: Added) -> float:
    """Return the seconds that a step takes outside its all-reduces, with what a plan has `added` on a rank."""
    memory = bytes_moved(sizes, step, tp=tp, added=added) / (ATTAINED * machine.memory_bytes_per_second)
    compute = flops(sizes, step, tp=tp, added=added) / (ATTAINED * machine.flops_per_second)
    return max(memory, compute)


def as_measured(
    hardware: Hardware,
    sizes: ModelSizes,
    *,
    phase: Phase,
    name: str,
    batch: int | None = None,
    context: int | None = None,
    added: Added = NOTHING_ADDED,
) -> LatencyModel:
    """Return the latency model with a measured dense step: of `batch` and `context`, else the first that was timed.

    What a plan has `added` on a rank takes as long as the step's own, in proportion. `name` is what `hardware` is
    called in messages. Raises InputError where that step is not there, or took less than its all-reduces timed alone.
    """
    rows = [s for s in hardware.steps if s.phase == phase and s.blocks == "dense"]
    if not rows:
        raise InputError(f"{name} holds no {phase} step of the dense model; run `spd-calib bench` again.")
    row = next((s for s in rows if s.batch == (batch or s.batch) and s.tokens == (context or s.tokens)), None)
    if row is None:
        timed = ", ".join(f"batch {s.batch} and {s.tokens} tokens" for s in rows)
        raise InputError(f"{name} holds steps of {timed}; leave out `batch` and `context`, or bench others.")
    step = Step(phase, row.batch, row.tokens, ITEMSIZE[hardware.provenance.dtype])
    times, message = hardware.all_reduce_seconds(), step.new_tokens * sizes.width * step.itemsize
    one = interpolate(times, message)
    compute = row.seconds.median - 2 * sizes.blocks * one
    if compute <= 0:
        raise InputError(
            f"In {name} the dense {phase} step is shorter than its {2 * sizes.blocks} all-reduces timed alone; bench "
            "again with more rounds, on a machine with nothing else to do."
        )
    tp = hardware.tensor_parallel.size
    amount = flops if phase == "prefill" else bytes_moved
    share = amount(sizes, step, tp=tp, added=added) / amount(sizes, step, tp=tp) - 1
    return LatencyModel(
        hardware=name,
        step=step,
        blocks=sizes.blocks,
        compute=compute,
        all_reduce=one,
        left=_left(times, sizes, message=message),
        added=compute * share,
    )


def held_against(hardware: Hardware, model: LatencyModel) -> dict[str, tuple[float, float]]:
    """Return (predicted, measured) seconds of the steps that `bench` timed with sync points dropped, by what was."""
    return {
        s.blocks: (model.seconds(s.dropped), s.seconds.median)
        for s in hardware.steps
        if (s.phase, s.batch, s.tokens) == (model.step.phase, model.step.batch, model.step.context)
        and s.blocks != "dense"
    }
