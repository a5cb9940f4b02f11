"""The latency model of a machine: from its rates, or from the steps that `spd-calib bench` timed on it."""

from collections.abc import Callable, Mapping
from functools import partial

import torch

from spd_calib.errors import InputError
from spd_calib.formats.drops import BITS
from spd_calib.formats.hardware import Hardware
from spd_calib.formats.machine import Machine
from spd_calib.formats.phases import Phase
from spd_calib.parallel.quantised_sync import GROUP, in_two_shots, packed_bytes

from .latency import LatencyModel, Step, Sync
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
    as_it_is = _as_it_is(times, step)
    all_reduce = as_it_is(sizes.width)
    fused = machine.fused_norm if machine.fused_norm and message <= machine.fused_norm.max_bytes else None
    after_norm = min(fused.left_seconds, all_reduce) if fused else 0.0

    def quantised(bits: int, width: int) -> float:
        sent = packed_bytes(torch.Size([step.new_tokens, width]), bits)
        moved = _moved_by_packing(step.new_tokens * width * step.itemsize, sent, ranks=tp)
        return interpolate(times, sent) + moved / (ATTAINED * machine.memory_bytes_per_second)

    return LatencyModel(
        hardware=machine.name,
        step=step,
        blocks=sizes.blocks,
        compute=dense,
        all_reduce=all_reduce,
        left=_left(as_it_is, sizes, fused=after_norm),
        added=_busy(machine, sizes, tp=tp, step=step, added=added) - dense,
        quantised=_quantised_syncs(quantised, sizes, fused=after_norm),
    )


def _as_it_is(times: Mapping[int, float], step: Step) -> Callable[[int], float]:
    """Return what tells how long an all-reduce takes of so many values a token, from `times` by bytes."""
    return lambda width: interpolate(times, step.new_tokens * width * step.itemsize)


def _left(seconds: Callable[[int], float], sizes: ModelSizes, *, fused: float = 0.0) -> float:
    """Return the seconds that a dropped sync point leaves: of a fused kernel `fused`, behind norms a wider message.

    `seconds` tells how long the sync that settles it takes for a message of so many values a token.
    """
    return seconds(2 * sizes.width) - seconds(sizes.width) if sizes.side_by_side else fused


def _quantised_syncs(seconds: Callable[[int, int], float], sizes: ModelSizes, *, fused: float = 0.0) -> dict[int, Sync]:
    """Return the quantised syncs by their bits; `seconds` tells how long one takes, of so many bits and values a token.

    No kernel fuses one with the norm behind it, whose seconds, `fused`, are left.
    """
    return {
        bits: Sync(kept=seconds(bits, sizes.width) + fused, left=_left(partial(seconds, bits), sizes, fused=fused))
        for bits in BITS
    }


def _moved_by_packing(message: int, sent: int, *, ranks: int) -> int:
    """Return the bytes of memory that packing and unpacking move, of a message of `message` bytes that is `sent`.

    The message is read and written once. What is sent is written, and read from every rank; in two shots each rank
    reads its share from all, and then the sum.
    """
    return 2 * message + (3 if in_two_shots(sent, ranks) else 1 + ranks) * sent


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

    What a plan has `added` on a rank takes as long as the step's own, in proportion. Quantised syncs that were not
    timed take as long as sums of the bytes they send. `name` is what `hardware` is called in messages. Raises
    InputError where that step is not there, or took less than its all-reduces timed alone.
    """
    rows = [s for s in hardware.steps if s.phase == phase and s.blocks == "dense"]
    if not rows:
        raise InputError(f"{name} holds no {phase} step of the dense model; run `spd-calib bench` again.")
    row = next((s for s in rows if s.batch == (batch or s.batch) and s.tokens == (context or s.tokens)), None)
    if row is None:
        timed = ", ".join(f"batch {s.batch} and {s.tokens} tokens" for s in rows)
        raise InputError(f"{name} holds steps of {timed}; leave out `batch` and `context`, or bench others.")
    step = Step(phase, row.batch, row.tokens, ITEMSIZE[hardware.provenance.dtype])
    times = hardware.all_reduce_seconds()
    as_it_is = _as_it_is(times, step)

    def quantised(bits: int, width: int) -> float:
        if measured := hardware.quantised_sync_seconds(bits):
            filled_up = GROUP * -(-width // GROUP)  # as what was timed is
            return interpolate(measured, step.new_tokens * filled_up * step.itemsize)
        return interpolate(times, packed_bytes(torch.Size([step.new_tokens, width]), bits))

    one = as_it_is(sizes.width)
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
        left=_left(as_it_is, sizes),
        added=compute * share,
        quantised=_quantised_syncs(quantised, sizes),
    )


def held_against(hardware: Hardware, model: LatencyModel) -> dict[str, tuple[float, float]]:
    """Return (predicted, measured) seconds of the steps that `bench` timed with sync points dropped, by what was."""
    return {
        s.blocks: (model.seconds(s.dropped, s.quantised), s.seconds.median)
        for s in hardware.steps
        if (s.phase, s.batch, s.tokens) == (model.step.phase, model.step.batch, model.step.context)
        and s.blocks != "dense"
    }
