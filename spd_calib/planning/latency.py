"""How long a step takes, with all sync points and without some: what a dropped all-reduce is worth on a machine.

    step = max(bytes moved / memory rate, FLOPs / arithmetic rate) + all-reduces * time of one

Bytes are a rank's weights and its KV cache; a recovered plan's predictors add theirs to all but the dense step. Nothing
is taken to overlap, and no rate is reached in full: both are multiplied by ATTAINED. The embedding's all-reduce, the
gathering of the logits, launches and the scheduler are not in it: a real step is longer, and the share saved smaller.
Where a machine was measured (`spd-calib bench`) its own dense step stands in for the first term.
"""

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError
from transformers import PreTrainedModel

from spd_calib.errors import InputError, SpdError
from spd_calib.formats.files import read
from spd_calib.formats.hardware import Hardware
from spd_calib.formats.machine import AllReduce, Machine
from spd_calib.formats.plan import Compensation, Latency, Plan
from spd_calib.models.architecture import HeadCounts
from spd_calib.models.probe import find_layers

Phase = Literal["decode", "prefill"]
ATTAINED = 0.8  # of a data sheet's rates; assumed, not measured
COLUMNS = ["ranks", "bytes", "seconds", "memory_bytes_per_second", "flops_per_second"]
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, weights in elements; biases and norms are left out."""

    blocks: int
    width: int
    counts: HeadCounts
    query_weights: int  # of q and o, a block
    kv_weights: int  # of k and v, a block
    mlp_weights: int  # of a block
    head_weights: int  # what makes logits of the last hidden state; the embedding is looked up, not read

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Shape":
        """Of any supported model; its weights may be on the meta device."""
        layers = find_layers(model)
        parts = layers[0]
        return cls(
            blocks=len(layers),
            width=parts.q.in_features,
            counts=HeadCounts.of(parts),
            query_weights=parts.q.weight.numel() + parts.o.weight.numel(),
            kv_weights=parts.k.weight.numel() + parts.v.weight.numel(),
            mlp_weights=sum(linear.weight.numel() for linear in (*parts.mlp_in, parts.down)),
            head_weights=model.get_output_embeddings().weight.numel(),
        )


@dataclass(frozen=True)
class Step:
    """One forward: `batch` sequences of `context` tokens, all of them new (prefill) or one more each (decode)."""

    phase: Phase
    batch: int
    context: int
    itemsize: int  # bytes of a weight, a cached value, a hidden value

    @property
    def new_tokens(self) -> int:
        return self.batch * (self.context if self.phase == "prefill" else 1)


@dataclass(frozen=True)
class LatencyModel:
    """Seconds of a step outside its all-reduces, of one all-reduce, and of what a plan's predictors add to a step."""

    hardware: str
    step: Step
    blocks: int
    compute: float
    all_reduce: float
    predictors: float = 0.0

    def seconds(self, dropped: int) -> float:
        """Of a step without `dropped` of its 2 L all-reduces."""
        return self.compute + (2 * self.blocks - dropped) * self.all_reduce + (self.predictors if dropped else 0.0)

    def saved(self, dropped: int) -> float:
        """Share of the dense step's time; below 0 where the predictors cost more than the all-reduces did."""
        return (dropped * self.all_reduce - (self.predictors if dropped else 0.0)) / self.seconds(0)

    @property
    def ceiling(self) -> float:
        """What dropping every droppable sync point would save, all but the last block's MLP, and nothing added."""
        return (2 * self.blocks - 1) * self.all_reduce / self.seconds(0)

    def drops_for(self, saving: float, available: int) -> int:
        """The fewest drops that save this share: all are worth the same all-reduce, which ones is a matter of KL.

        Raises SpdError, naming the ceiling, where all `available` do not.
        """
        for n in range(available + 1):
            if self.saved(n) >= saving * (1 - 1e-9):
                return n
        raise SpdError(
            f"--min-speedup {100 * saving:.3g}% is beyond what can be saved here: dropping all {available} sync points "
            f"profiled saves {100 * self.saved(available):.3g} %, all {2 * self.blocks - 1} there are "
            f"{100 * self.ceiling:.3g} % ({self.step.phase}, batch {self.step.batch}, context {self.step.context}, "
            f"{self.hardware}); ask for less."
        )

    def latency(self, dropped: int) -> Latency:
        """As it stands in a plan."""
        return Latency(
            hardware=self.hardware,
            phase=self.step.phase,
            batch=self.step.batch,
            context=self.step.context,
            all_reduce_seconds=self.all_reduce,
            dense_seconds=self.seconds(0),
            planned_seconds=self.seconds(dropped),
            saved=self.saved(dropped),
            ceiling=self.ceiling,
        )


def bytes_moved(shape: Shape, tp: int, step: Step) -> float:
    """A rank reads its weights and the cache once (decode), or writes the cache (prefill)."""
    kv_heads = _kv_heads(shape, tp)
    cache = 2 * shape.blocks * kv_heads * shape.counts.head_dim * step.batch * step.context
    return (shape.blocks * _block_weights(shape, tp) + shape.head_weights / tp + cache) * step.itemsize


def flops(shape: Shape, tp: int, step: Step) -> float:
    """Of a rank: two for each weight and new token, the head's for the last token alone, and causal attention."""
    linear = 2 * step.new_tokens * shape.blocks * _block_weights(shape, tp) + 2 * step.batch * shape.head_weights / tp
    seen = step.context if step.phase == "decode" else step.context / 2  # keys a token attends to, on average
    return linear + 4 * shape.blocks * shape.counts.heads / tp * shape.counts.head_dim * step.new_tokens * seen


def predictor_weights(plan: Plan, shape: Shape) -> int:
    """Of a rank: elements that the predictors of a recovered plan add, all blocks together."""
    own = shape.counts.heads // plan.tensor_parallel.size * shape.counts.head_dim  # a rank's head outputs

    def of_block(c: Compensation) -> int:
        matrices = {"mean": 0, "low_rank": c.rank * (own + shape.width), "full": own * shape.width}
        return matrices[c.kind] + shape.width

    return sum(of_block(b.compensation) for b in plan.blocks if b.compensation)


def _kv_heads(shape: Shape, tp: int) -> int:
    """Of a rank: with more ranks than KV heads each holds one of them."""
    return max(shape.counts.kv_heads // tp, 1)


def _block_weights(shape: Shape, tp: int) -> float:
    kv_share = _kv_heads(shape, tp) / shape.counts.kv_heads
    return (shape.query_weights + shape.mlp_weights) / tp + shape.kv_weights * kv_share


def on_machine(machine: Machine, shape: Shape, tp: int, step: Step, predictors: int = 0) -> LatencyModel:
    """The model from a machine's rates; `predictors`: weights that they add on a rank.

    Raises InputError for another number of ranks than its table is of.
    """
    if machine.ranks != tp:
        raise InputError(
            f"{machine.name} holds all-reduce times of {machine.ranks} ranks, not of {tp}, and how a link scales is "
            "not guessed; measure yours with `spd-calib bench`, or give a CSV of them."
        )

    def busy(more: int) -> float:
        memory = (bytes_moved(shape, tp, step) + more * step.itemsize) / (ATTAINED * machine.memory_bytes_per_second)
        compute = (flops(shape, tp, step) + 2 * step.new_tokens * more) / (ATTAINED * machine.flops_per_second)
        return max(memory, compute)

    table = {r.bytes: r.seconds for r in machine.all_reduces}
    size = step.new_tokens * shape.width * step.itemsize
    one = interpolate(table, size)
    return LatencyModel(machine.name, step, shape.blocks, busy(0), one, busy(predictors) - busy(0))


def as_measured(hardware: Hardware, shape: Shape, phase: Phase, name: str, predictors: int = 0) -> LatencyModel:
    """The model with a measured dense step, of the batch and prompt it was timed with.

    `predictors`: weights that they add on a rank; they take as long as the step's own, in proportion.

    Raises InputError where that step is not there, or took less than its all-reduces timed alone.
    """
    row = next((s for s in hardware.steps if s.phase == phase and s.blocks == "dense"), None)
    if row is None:
        raise InputError(f"{name} holds no {phase} step of the dense model; run `spd-calib bench` again.")
    step = Step(phase, row.batch, row.tokens, ITEMSIZE[hardware.provenance.dtype])
    one = interpolate(hardware.all_reduce_seconds(), step.new_tokens * shape.width * step.itemsize)
    compute = row.seconds.median - 2 * shape.blocks * one
    if compute <= 0:
        raise InputError(
            f"In {name} the dense {phase} step is shorter than its {2 * shape.blocks} all-reduces timed alone; bench "
            "again with more --rounds, on a machine with nothing else to do."
        )
    tp = hardware.tensor_parallel.size
    share = predictors * step.itemsize / bytes_moved(shape, tp, step)
    if phase == "prefill":
        share = 2 * step.new_tokens * predictors / flops(shape, tp, step)
    return LatencyModel(name, step, shape.blocks, compute, one, compute * share)


def held_against(hardware: Hardware, model: LatencyModel) -> dict[str, tuple[float, float]]:
    """(predicted, measured) seconds of the steps that `bench` timed with sync points dropped, by what was dropped."""
    return {
        s.blocks: (model.seconds(s.dropped), s.seconds.median)
        for s in hardware.steps
        if s.phase == model.step.phase and s.blocks != "dense"
    }


def interpolate(table: Mapping[int, float], size: int) -> float:
    """Seconds at `size` bytes: straight lines in log-log; below the table its least, above it as bytes grow."""
    sizes = sorted(table)
    if size <= sizes[0]:
        return table[sizes[0]]
    if size >= sizes[-1]:
        return table[sizes[-1]] * size / sizes[-1]
    i = next(i for i, s in enumerate(sizes) if s >= size)
    low, high = sizes[i - 1], sizes[i]
    share = math.log(size / low) / math.log(high / low)
    return table[low] * (table[high] / table[low]) ** share


def shipped() -> list[str]:
    """Names of the tables that come with this package."""
    return sorted(f.name.removesuffix(".json") for f in _folder().iterdir() if f.name.endswith(".json"))


def load(name: str) -> Machine | Hardware:
    """A shipped table by its name, a hardware.json, or a CSV with COLUMNS. Raises InputError for anything else."""
    if name in shipped():
        return Machine.model_validate_json((_folder() / f"{name}.json").read_text(encoding="utf-8"))
    path = Path(name)
    if path.suffix == ".csv":
        return _from_csv(path)
    if not path.exists() and path.suffix != ".json":
        raise InputError(f"--hardware {name} is no file and none of {', '.join(shipped())}.")
    return read(Hardware, path)


def _from_csv(path: Path) -> Machine:
    """Every row one size; the rates of memory and arithmetic stand in each and must agree."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        [(ranks, memory, rate)] = {(r["ranks"], r["memory_bytes_per_second"], r["flops_per_second"]) for r in rows}
        return Machine(
            name=path.stem,
            source=path.name,
            ranks=int(ranks),
            memory_bytes_per_second=float(memory),
            flops_per_second=float(rate),
            all_reduces=[AllReduce(bytes=int(r["bytes"]), seconds=float(r["seconds"])) for r in rows],
        )
    except OSError as e:
        raise InputError(f"{path} cannot be read: {e.strerror}.") from None
    except (KeyError, ValueError, TypeError, ValidationError):
        raise InputError(
            f"{path} is no table of all-reduces: it needs the columns {', '.join(COLUMNS)}, numbers above 0, the sizes "
            "in order, and the same ranks and rates in every row."
        ) from None


def _folder() -> Any:
    return resources.files("spd_calib.planning") / "machines"
