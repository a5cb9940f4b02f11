"""The form of a vLLM decoder layer: where its parts are, and what a planned forward calls of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from .forwards import Parts
from .mixtures import is_mixture, open_mixture
from .projections import open_projection


@dataclass(frozen=True)
class LayerForm:
    """The classes of an architecture's model and of its layers, with their modules, and the paths of a layer's parts.

    `planned(layer, parts, planned)` gives the forward that takes the place of the layer's own.
    """

    model: str
    layer: str
    planned: Callable[..., Callable]
    layers: str = "model.layers"
    norm1: str = "input_layernorm"
    norm2: str = "post_attention_layernorm"
    attention_out_norm: str = ""
    mlp_out_norm: str = ""
    o: str = "self_attn.o_proj"
    linear_o: str = ""  # the same of a layer with linear attention, where a model has such beside others
    down: str = "mlp.down_proj"
    mixture: str = ""  # the layer's module, if any, that may be a mixture of experts; else its MLP ends in `down`
    gate: str = "gate"  # its router
    scale: str = ""  # the layer's attribute, if any, by which it multiplies both branches
    stream_scale: str = ""  # the layer's buffer, if any, by which it multiplies the whole stream in the end
    switches: tuple[tuple[str, Any], ...] = ()  # attributes of the layer that must have these values
    configured: tuple[tuple[str, Any], ...] = ()  # and of the model's configuration, where vLLM reads no others
    routers: tuple[tuple[str, Any], ...] = ()  # and of the routers of its experts, which vLLM configures otherwise

    def parts(self, layer: nn.Module) -> Parts:
        """Return the parts of a layer of this form."""
        scale = float(getattr(layer, self.scale)) if self.scale else 1.0
        mixture = self.mixture_of(layer)
        o = open_projection(self.o_proj(layer), scale)
        down = (
            open_mixture(mixture, gate=self.gate, rank=o.rank, scale=scale)
            if mixture
            else open_projection(layer.get_submodule(self.down), scale)
        )
        norms = (self.norm1, self.norm2, self.attention_out_norm, self.mlp_out_norm)
        norm1, norm2, a, m = (layer.get_submodule(path) if path else nn.Identity() for path in norms)
        stream_scale = layer.get_buffer(self.stream_scale) if self.stream_scale else None
        return Parts(norm1, norm2, o, down, a, m, stream_scale)

    def o_proj(self, layer: nn.Module) -> Any:
        """Return the projection behind a layer's attention."""
        linear = self.linear_o and hasattr(layer, self.linear_o.partition(".")[0])
        return layer.get_submodule(self.linear_o if linear else self.o)

    def mixture_of(self, layer: nn.Module) -> nn.Module | None:
        """Return a layer's mixture of experts; None where it has a dense MLP."""
        module = layer.get_submodule(self.mixture) if self.mixture else None
        return module if is_mixture(module) else None

    def linears(self, layer: nn.Module) -> list[Any]:
        """Return the layer's row-parallel projections, behind each of which there is a sync point."""
        down = [] if self.mixture_of(layer) else [layer.get_submodule(self.down)]
        return [self.o_proj(layer), *down]

    def called(self, layer: nn.Module) -> list[nn.Module]:
        """Return the modules whose own forward a planned layer calls, or puts another in the place of."""
        mixture: Any = self.mixture_of(layer)
        of_mixture = [] if mixture is None else [mixture, mixture.get_submodule(self.gate), mixture.experts]
        return [layer, *self.linears(layer), *of_mixture]
