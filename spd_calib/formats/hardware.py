"""hardware.json: what a sync costs on a machine, measured on real ranks; the latency model of `plan` reads it."""

from typing import Literal, Self

from pydantic import Field, model_validator

from .common import Count, Finite, ModelRef, Part, Provenance, Sha256, TensorParallel

Seconds = Finite


class Timing(Part):
    """Seconds over `repeats` measurements, each of them that of the slowest rank."""

    median: Seconds = Field(gt=0)
    p10: Seconds = Field(gt=0, description="10 % are shorter")
    p90: Seconds = Field(gt=0, description="10 % are longer")
    repeats: int = Field(gt=0)


class Collective(Part):
    """A sum of one tensor over all ranks."""

    method: Literal["all_reduce", "all_gather_and_sum", "quantised_sync"] = Field(
        description="all_gather_and_sum sends everything to every rank, which adds it up itself: two one-way delays; "
        "quantised_sync sends fewer bits a value, packing and unpacking included"
    )
    bits: Literal[8, 6, 4] | None = Field(
        default=None, exclude_if=lambda value: value is None, description="Of a quantised sync: bits of a value"
    )
    ranks: int = Field(gt=1)
    bytes: int = Field(gt=0, description="Of the tensor that is summed")
    seconds: Timing

    @model_validator(mode="after")
    def _bits_of_quantised(self) -> Self:
        if (self.method == "quantised_sync") != (self.bits is not None):
            raise ValueError("a quantised sync has bits, and nothing else does")
        return self


class TimedStep(Part):
    """One forward of the model: a whole prompt (prefill), or one token behind it with the KV cache (decode)."""

    phase: Literal["prefill", "decode"]
    blocks: Literal["dense", "plan", "every_block_dropped"] = Field(description="Which sync points are dropped")
    dropped: Count = Field(description="Sync points dropped")
    quantised: dict[int, Count] = Field(
        default_factory=dict, exclude_if=lambda value: not value, description="Quantised syncs, their number by bits"
    )
    batch: int = Field(gt=0)
    tokens: int = Field(gt=0, description="Of the prompt")
    seconds: Timing


class Hardware(Part):
    format: Literal["spd-calib/hardware"] = "spd-calib/hardware"
    version: Literal[1] = 1
    model: ModelRef
    plan_sha256: Sha256 = Field(description="Of the plan's file")
    tensor_parallel: TensorParallel
    device: str = Field(min_length=1, description="Name of the processor or GPU")
    backend: Literal["gloo", "nccl"]
    runtime: Literal["torchrun", "vllm"] = Field(
        default="torchrun",
        exclude_if=lambda value: value == "torchrun",
        description="torchrun: transformers' own modules, no serving engine; vllm: the engine as it is served, its "
        "scheduler and sampler with it",
    )
    execution: Literal["eager", "compiled", "cuda_graphs"] = Field(
        default="eager", exclude_if=lambda value: value == "eager", description="How the steps were run"
    )
    nodes: int = Field(gt=0, description="Machines the ranks are spread over")
    gathered_at_most: Count = Field(
        default=0, description="Bytes up to which the steps' sums went by all_gather_and_sum; beyond, by all_reduce"
    )
    collectives: list[Collective] = Field(min_length=1)
    steps: list[TimedStep] = Field(min_length=1)
    provenance: Provenance

    def all_reduce_seconds(self) -> dict[int, float]:
        """Return the median time of a sum over the ranks as the steps made it, by bytes, smallest first."""
        rows = [c for c in self.collectives if c.bits is None]
        rows = [c for c in rows if (c.method == "all_reduce") == (c.bytes > self.gathered_at_most)]
        return _by_bytes(rows)

    def quantised_sync_seconds(self, bits: int) -> dict[int, float]:
        """Return the median time of a quantised sync, by bytes of what is summed; empty where none was timed."""
        return _by_bytes([c for c in self.collectives if c.bits == bits])


def _by_bytes(rows: list[Collective]) -> dict[int, float]:
    return {c.bytes: c.seconds.median for c in sorted(rows, key=lambda c: c.bytes)}
