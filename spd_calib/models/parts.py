"""The parts of a decoder layer: its linear layers as ranks divide them, its norms, and what its branches go through."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .layer_names import ExpertNames, LayerNames


@dataclass(frozen=True)
class LinearRows:
    """One of the projections that a fused linear layer holds: `out_features` of its output rows, from `start` on."""

    linear: nn.Linear
    start: int
    out_features: int

    @property
    def in_features(self) -> int:
        return self.linear.in_features

    @property
    def weight(self) -> Tensor:
        """Return its rows of the weight, which they share memory with."""
        return self.linear.weight[self.start : self.start + self.out_features]

    @property
    def bias(self) -> Tensor | None:
        bias = self.linear.bias
        return None if bias is None else bias[self.start : self.start + self.out_features]


Projection = nn.Linear | LinearRows


@dataclass(frozen=True)
class MLPParts:
    """The parts of a dense MLP. `mlp_in` holds the gate first where there is one (LayerNames)."""

    mlp_in: tuple[nn.Linear, ...]
    activation: nn.Module
    down: nn.Linear

    @property
    def linears(self) -> tuple[nn.Linear, ...]:
        return (*self.mlp_in, self.down)


@dataclass(frozen=True)
class ExpertParts:
    """The parts of a mixture of experts. `experts` is transformers' module of all experts, their weights stacked.

    `names` is the row that they were found by; it says what the router returns.
    """

    router: nn.Module
    experts: nn.Module
    shared: MLPParts | None
    shared_gate: nn.Linear | None
    names: ExpertNames

    @property
    def neurons(self) -> int:
        """Return the number of neurons of one expert, before they are divided over ranks."""
        size: Any = getattr(self.experts, "intermediate_dim", None) or self.experts.intermediate_size
        return int(size)

    @property
    def transposed(self) -> bool:
        """Say whether the stacked weights are stored as [in, out]."""
        return bool(getattr(self.experts, "is_transposed", False))

    @property
    def has_bias(self) -> bool:
        """Say whether the experts' linear layers have biases."""
        return bool(getattr(self.experts, "has_bias", False))

    @property
    def interleaved(self) -> bool:
        """Say whether the rows of the gate and of up take turns, and do not lie one half below the other."""
        return not getattr(self.experts, "is_concatenated", True)

    def weight(self, name: str, expert: int) -> Tensor:
        """Return the weight `name` of one expert as [out, in], which it shares memory with, however it is stored."""
        weight = self.experts.get_parameter(name)[expert]
        return weight.T if self.transposed else weight

    def bias(self, name: str, expert: int) -> Tensor | None:
        """Return the bias [out] of one expert's weight `name`; None where experts have none."""
        return self.experts.get_parameter(f"{name}_bias")[expert] if self.has_bias else None

    @property
    def linears(self) -> tuple[nn.Linear, ...]:
        """Return the linear layers that are cut over ranks, which are those of the shared experts alone."""
        return self.shared.linears if self.shared else ()


@dataclass(frozen=True)
class LayerParts:
    """The parts of one decoder layer, found, by the names of a row (LayerNames).

    The layer is u = norm1(x), h = x + A(attention(u)), y = h + M(mlp(norm2(h))): A and M are the norm that the branch
    goes through, if any, and then a multiplication by `scale`, biases and all. Where there is a `stream_scale`, which
    gives a number [1] of the layer's weights, the layer gives that times y.

    The rows of the projections in `by_head` are divided over ranks by query head, as many for each: those of q, or
    whatever else a row names, those behind latents last. Those in `by_kv_head`, k and v, are divided by KV head;
    `latents` are whole on every rank. In a linear attention q and k are divided by KV head and v by head, or all by
    head in one layer, and `convolution` as these are.
    """

    names: LayerNames
    norm1: nn.Module  # the identity where there is none
    attention: nn.Module
    by_head: tuple[Projection, ...]
    o: nn.Linear
    norm2: nn.Module
    ffn: MLPParts | ExpertParts
    by_kv_head: tuple[Projection, ...] = ()
    latents: tuple[nn.Linear, ...] = ()
    convolution: nn.Conv1d | None = None
    attention_out_norm: nn.Module | None = None
    mlp_out_norm: nn.Module | None = None
    scale: float = 1.0
    stream_scale: Callable[[], Tensor] | None = None

    @property
    def o_scale(self) -> float:
        """Return what a partial sum of o_proj is multiplied by: `scale`, but where a norm follows that comes later."""
        return self.scale if self.attention_out_norm is None else 1.0

    @property
    def down_scale(self) -> float:
        """Return what a partial sum of down_proj is multiplied by; see `o_scale`."""
        return self.scale if self.mlp_out_norm is None else 1.0

    @property
    def linears(self) -> tuple[nn.Linear, ...]:
        """Return the linear layers as the model holds them, a fused one once."""
        cut = dict.fromkeys(p.linear if isinstance(p, LinearRows) else p for p in (*self.by_head, *self.by_kv_head))
        return (*cut, *self.latents, self.o, *self.ffn.linears)

    @property
    def reading(self) -> dict[str, Projection]:
        """Return the projections that read what enters the attention, by name."""
        if self.by_kv_head and self.convolution is None:
            return dict(zip("qkv", (*self.by_head, *self.by_kv_head), strict=False))  # without v, k gives the values
        names = (*self.names.qkv, *self.names.by_head, *self.names.latents)
        paths = {name: name.removeprefix(f"{self.names.attention}.") for name in names}
        return {path.rpartition(".")[2]: self.attention.get_submodule(path) for path in paths.values()}  # type: ignore[misc]

    @property
    def head_parameters(self) -> tuple[str, ...]:
        """Return the names, in the attention, of its parameters with one number a head (LayerNames)."""
        return tuple(name.removeprefix(f"{self.names.attention}.") for name in self.names.head_parameters)

    @property
    def experts(self) -> ExpertParts | None:
        """Return the parts of the layer's mixture of experts; None where it has a dense MLP."""
        return self.ffn if isinstance(self.ffn, ExpertParts) else None

    @property
    def dense(self) -> MLPParts:
        """Return the parts of the layer's dense MLP; raises TypeError where it has a mixture of experts."""
        if not isinstance(self.ffn, MLPParts):
            raise TypeError("a mixture of experts has no linear layers of a dense MLP")
        return self.ffn

    @property
    def mlp_in(self) -> tuple[nn.Linear, ...]:
        return self.dense.mlp_in

    @property
    def activation(self) -> nn.Module:
        return self.dense.activation

    @property
    def down(self) -> nn.Linear:
        return self.dense.down
