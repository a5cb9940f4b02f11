"""Our planned layers at the shapes of one rank of a large model, with stand-ins for the cache and the all-reduce.

What vLLM has around them is played by parts with the same interfaces: a linear layer, a norm that takes the residual,
an all-reduce. The stand-in for that takes a given time and sums nothing, so one GPU will do. On a CPU it all runs, too,
at toy sizes; there the times mean nothing.
"""

import statistics
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spd_calib.formats.drops import Drop, Strategy
from spd_calib.runtimes.planned import Planned
from spd_calib.runtimes.projections import Projection
from spd_calib.runtimes.vllm import forwards
from spd_calib.runtimes.vllm.forwards import Parts, fused
from spd_calib.runtimes.vllm.projections import ending_before

Variant = Literal["kept", "dropped", "dropped, p added by the compiler"]
VARIANTS: tuple[Variant, ...] = ("kept", "dropped", "dropped, p added by the compiler")


@dataclass(frozen=True)
class Sizes:
    """Sizes of one rank's share of a layer: heads of width `head` over `kv_heads`, and MLP neurons."""

    d: int
    heads: int
    kv_heads: int
    head: int
    neurons: int


LLAMA_70B_TP8 = Sizes(d=8192, heads=8, kv_heads=1, head=128, neurons=3584)
TOY = Sizes(d=32, heads=2, kv_heads=1, head=16, neurons=48)

all_reduce_takes = [0.0, 0.0]
"""What the stand-in takes: cycles of the GPU's clock, seconds of the CPU's. Read each time, so that nothing is compiled
anew for another time."""


@torch.library.custom_op("spd_calib_bench::all_reduce", mutates_args=("partial",))
def all_reduce(partial: Tensor) -> None:
    """Take as long as an all-reduce; sums nothing."""
    _wait(partial.device)


@torch.library.custom_op("spd_calib_bench::all_reduce_and_norm", mutates_args=("partial", "residual"))
def all_reduce_and_norm(partial: Tensor, residual: Tensor) -> None:
    """Take as long as the kernel that reduces, adds the residual stream and normalises; computes nothing."""
    _wait(partial.device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda._sleep(int(all_reduce_takes[0]))
    else:
        end = time.perf_counter() + all_reduce_takes[1]
        while time.perf_counter() < end:
            pass


class Norm(nn.Module):
    """An RMS norm as vLLM's; `reduces`: with a residual it is part of the kernel of the all-reduce before it."""

    def __init__(self, d: int, *, reduces: bool):
        super().__init__()
        self.weight, self.reduces = nn.Parameter(torch.rand(d) + 0.5), reduces

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        if residual is not None and self.reduces:
            all_reduce_and_norm(x, residual)
            return x, residual
        total = x if residual is None else x + residual
        wide = total.float()
        normed = (self.weight * wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype)
        return normed if residual is None else (normed, total)


class RowParallel(nn.Module):
    """What a Projection asks of vLLM's RowParallelLinear."""

    return_bias, bias = True, None

    def __init__(self, inputs: int, d: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d, inputs) / inputs**0.5)
        self.quant_method = SimpleNamespace(apply=lambda linear, z, b: nn.functional.linear(z, linear.weight, b))
        self.forward = ending_before(self)

    @property
    def params_dtype(self) -> torch.dtype:
        return self.weight.dtype


class Layer(nn.Module):
    """One rank's part of a Llama layer that decodes: a cache of keys and values that stays as it is."""

    def __init__(self, sizes: Sizes, variant: Variant, *, norm_reduces: bool):
        super().__init__()
        self.sizes = sizes
        d, width = sizes.d, sizes.heads * sizes.head
        self.norms = nn.ModuleList(Norm(d, reduces=norm_reduces) for _ in range(2))
        self.q, self.gate_up = (nn.Linear(d, n, bias=False) for n in (width, 2 * sizes.neurons))
        self.o, self.down = RowParallel(width, d), RowParallel(sizes.neurons, d)
        o, down = (Projection(linear, rank=0, in_place=variant == "dropped") for linear in (self.o, self.down))
        at_attention = Drop(Strategy.KEEP_SYNC if variant == "kept" else Strategy.BLOCK_DROP)
        self.planned = fused(self, Parts(*self.norms, o, down), Planned(at_attention, Drop(Strategy.KEEP_SYNC)))

    def self_attn(self, positions: tuple[Tensor, Tensor], hidden_states: Tensor) -> Tensor:
        keys, values = positions  # [batch, kv_heads, context, head]: what this stand-in reads in their place
        q = self.q(hidden_states).view(-1, self.sizes.heads, 1, self.sizes.head)
        found = nn.functional.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
        return self.o(found.reshape(q.shape[0], -1))[0]

    def mlp(self, u: Tensor) -> Tensor:
        gate, up = self.gate_up(u).chunk(2, -1)
        return self.down(nn.functional.silu(gate) * up)[0]


class Layers(nn.Module):
    """Layers as they stand in the middle of a model, one variant of all of them.

    `norm_reduces`: all-reduce, residual and norm are one kernel, as vLLM has it for small messages; else two.
    """

    def __init__(self, sizes: Sizes, variant: Variant, *, count: int, norm_reduces: bool):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(sizes, variant, norm_reduces=norm_reduces) for _ in range(count))

    def forward(self, hidden: Tensor, residual: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.layers:
            hidden, residual = layer.planned((keys, values), hidden, residual)
        return hidden, residual


def stand_in(*, norm_reduces: bool) -> None:
    """Have the planned forwards call the stand-in for vLLM's all-reduce, from now on."""

    def reduced(partial: Tensor) -> Tensor:
        if not norm_reduces:
            all_reduce(partial)
        return partial

    forwards.all_reduced = reduced


def inputs_of(sizes: Sizes, *, batch: int, context: int, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return random hidden, residual [batch, d], and keys and values [batch, kv_heads, context, head]."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(batch, sizes.d)] * 2 + [(batch, sizes.kv_heads, context, sizes.head)] * 2
    return tuple(torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)


@torch.no_grad()
def seconds_a_call(layers: nn.Module, given: tuple[Tensor, ...], *, repeats: int) -> float:
    """Return the median seconds of a call; on a GPU of its replay in a CUDA graph."""
    for _ in range(3):
        layers(*given)
    seconds = []
    if given[0].device.type == "cpu":
        for _ in range(repeats):
            begun = time.perf_counter()
            layers(*given)
            seconds.append(time.perf_counter() - begun)
        return statistics.median(seconds)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layers(*given)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        layers(*given)
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(10):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e4)
    return statistics.median(seconds)


@torch.no_grad()
def kernels_a_call(layers: nn.Module, given: tuple[Tensor, ...]) -> int:
    """Return the number of kernels and copies that a call gives a GPU."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        layers(*given)
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in found.events())
