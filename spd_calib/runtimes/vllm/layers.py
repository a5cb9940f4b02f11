"""A vLLM decoder layer that drops its sync points (DESIGN section 2), and the list of layers known to have that form.

Names say nothing about what a layer computes (Gemma2 and Granite look like Llama), so the list is of vLLM's own
classes. `x` is the part of the residual stream that all ranks share (after a plain drop: the rank's own), `p` what the
rank still owes the others. Tensors are [N, d], N tokens of all requests in the batch.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spd_calib.errors import InputError
from spd_calib.formats.common import Strategy
from spd_calib.parallel.compensation import Compensation, check_shapes

KEEP, DROP, PLAIN = Strategy.KEEP_SYNC, Strategy.BLOCK_DROP, Strategy.PLAIN_DROP
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Point:
    """What one layer does: its two sync points, whether the layer before left a debt, and what its MLP reads."""

    attention: Strategy
    mlp: Strategy
    owes: bool
    compensated: bool = False

    @property
    def dense(self) -> bool:
        return self.attention == KEEP and self.mlp == KEEP and not self.owes


@dataclass(frozen=True)
class Form:
    """Where vLLM has the classes of an architecture, and its parts relative to model and layer."""

    module: str
    layer: str
    planned: Callable[[Any, Point], Callable]  # the forward that takes the place of the layer's own
    layers: str = "model.layers"
    o: str = "self_attn.o_proj"
    down: str = "mlp.down_proj"
    switches: tuple[tuple[str, Any], ...] = ()  # attributes of the layer that must have these values


def fused(layer: Any, point: Point) -> Callable[..., Pair]:
    """Llama's kind: a layer takes and gives (hidden, residual), and norms add the one to the other as they go.

    Between two layers, hidden is the sum of the MLP before; where that owes its all-reduce, it is the debt p.
    """
    norm1, norm2 = layer.input_layernorm, layer.post_attention_layernorm
    o_bias, down_bias = layer.self_attn.o_proj.bias, layer.mlp.down_proj.bias

    def forward(positions: Tensor, hidden_states: Tensor, residual: Tensor | None, **_: Any) -> Pair:
        p = None
        if residual is None:
            u, x = norm1(hidden_states), hidden_states
        elif point.owes:
            u, x, p = norm1(residual + hidden_states), residual, hidden_states
        else:
            u, x = norm1(hidden_states, residual)

        a = layer.self_attn(positions=positions, hidden_states=u)
        if point.compensated:
            a, predicted = a.chunk(2, -1)
            x = _add(x, o_bias)
            u, p = norm2(_add(x + predicted, p)), _add(a, p)
        elif point.attention == KEEP:
            (u, x), p = norm2(_add(_all_reduce(_add(a, p)), o_bias), x), None
        elif point.attention == DROP:
            x, p = _add(x, o_bias), _add(a, p)
            u = norm2(x + p)
        elif p is None:
            u, x = norm2(_add(a, o_bias), x)
        else:
            x = _add(x + a, o_bias)
            u = norm2(x + p)

        m = layer.mlp(u)
        if point.mlp == KEEP:
            return _add(_all_reduce(_add(m, p)), down_bias), x
        return _add(m, p), _add(x, down_bias)

    return forward


def unfused(layer: Any, point: Point) -> Callable[..., Tensor | Pair]:
    """OPT's kind: a layer takes and gives the residual stream alone, or (x, p) where something is owed."""
    norm1, norm2 = layer.self_attn_layer_norm, layer.final_layer_norm
    o_bias, down_bias = layer.self_attn.out_proj.bias, layer.fc2.bias

    def forward(hidden_states: Tensor | Pair) -> Tensor | Pair:
        x, p = hidden_states if isinstance(hidden_states, tuple) else (hidden_states, None)
        a = layer.self_attn(hidden_states=norm1(_add(x, p)))
        read = None
        if point.compensated:
            a, predicted = a.chunk(2, -1)
            x = _add(x, o_bias)
            read, p = _add(x + predicted, p), _add(a, p)
        elif point.attention == KEEP:
            x, p = _add(x + _all_reduce(_add(a, p)), o_bias), None
        elif point.attention == DROP:
            x, p = _add(x, o_bias), _add(a, p)
        else:
            x = _add(x + a, o_bias)

        neurons, _ = layer.fc1(norm2(_add(x, p) if read is None else read))
        m, _ = layer.fc2(layer.activation_fn(neurons))
        if point.mlp == KEEP:
            return _add(x + _all_reduce(_add(m, p)), down_bias)
        return _add(x, down_bias), _add(m, p)

    return forward


def predicting(o_proj: Any, predictor: Compensation) -> Callable[[Tensor], tuple[Tensor, None]]:
    """An o_proj that gives the rank's partial sum and, behind it, what its MLP is to read for it: [N, 2d].

    Here alone are the head outputs at hand; the attention hands on what o_proj gives.
    """
    partial_sum = type(o_proj).forward

    def forward(heads: Tensor) -> tuple[Tensor, None]:
        partial, _ = partial_sum(o_proj, heads)
        return torch.cat((partial, predictor(heads, partial)), -1), None

    return forward


_MODELS = "vllm.model_executor.models."
FORMS = {
    "LlamaForCausalLM": Form(_MODELS + "llama", "LlamaDecoderLayer", fused),
    "MistralForCausalLM": Form(
        _MODELS + "mistral", "MistralDecoderLayer", fused, switches=(("ada_rms_norm_t_cond", None),)
    ),
    "Qwen2ForCausalLM": Form(_MODELS + "qwen2", "Qwen2DecoderLayer", fused),
    "Qwen3ForCausalLM": Form(_MODELS + "qwen3", "Qwen3DecoderLayer", fused),
    "GemmaForCausalLM": Form(_MODELS + "gemma", "GemmaDecoderLayer", fused),
    "OPTForCausalLM": Form(
        _MODELS + "opt",
        "OPTDecoderLayer",
        unfused,
        layers="model.decoder.layers",
        o="self_attn.out_proj",
        down="fc2",
        switches=(("do_layer_norm_before", True),),
    ),
}
"""The allow-list: vLLM's model class -> the form of its layers."""


def apply(
    model: nn.Module, attention: Sequence[str], mlp: Sequence[str], predictors: Mapping[int, Compensation]
) -> None:
    """Make a loaded vLLM model run these strategies, one an attention and one an MLP; undoes what was applied before.

    `predictors`: this rank's, by block; blocks with one are block-dropped.

    Layers with nothing to drop keep vLLM's own forward. Raises InputError for a model that is not on the list.
    """
    form, layers = _find(model)
    if len(layers) != len(attention) or len(layers) != len(mlp):
        raise InputError(f"The plan has {len(attention)} blocks, but the model vLLM loaded has {len(layers)}.")
    if PLAIN in mlp or mlp[-1] != KEEP:
        raise InputError("An MLP sync point is kept or block-dropped, and the last one is kept: the plan is not valid.")
    owes = False
    for i, (layer, of_attention, of_mlp) in enumerate(zip(layers, attention, mlp, strict=True)):
        point = Point(Strategy(of_attention), Strategy(of_mlp), owes, i in predictors)
        layer.__dict__.pop("forward", None)
        o_proj = layer.get_submodule(form.o)
        o_proj.__dict__.pop("forward", None)
        for path in (form.o, form.down):
            linear = layer.get_submodule(path)
            linear.reduce_results, linear.skip_bias_add = point.dense, not point.dense
        if point.compensated:
            if point.attention != DROP:
                raise InputError(f"Block {i} has a predictor but is not block-dropped: the plan is not valid.")
            o_proj.forward = predicting(o_proj, _on(o_proj, i, predictors[i]))
        if not point.dense:
            layer.forward = form.planned(layer, point)
        owes = point.mlp != KEEP


def _find(model: nn.Module) -> tuple[Form, list[Any]]:
    """The model's form and its layers. Raises InputError unless the very classes are vLLM's own."""
    form = FORMS.get(type(model).__name__)
    if form is None or type(model) is not getattr(importlib.import_module(form.module), type(model).__name__):
        raise InputError(f"vLLM loaded {type(model).__module__}.{type(model).__name__}: its layers are not known.")
    layers = list(model.get_submodule(form.layers).children())
    expected = getattr(importlib.import_module(form.module), form.layer)
    for layer in layers:
        if type(layer) is not expected:
            raise InputError(f"vLLM loaded a {type(layer).__name__} where a {form.layer} is expected.")
        if any(getattr(layer, name) != value for name, value in form.switches):
            raise InputError(f"This {form.layer} is not h = x + attn(norm1(x)), y = h + mlp(norm2(h)): no plan.")
        for path in (form.o, form.down):
            if type(layer.get_submodule(path)).__name__ != "RowParallelLinear":
                raise InputError(f"The layer's {path} is no RowParallelLinear: its sync point is not known.")
    return form, layers


def _on(o_proj: Any, block: int, predictor: Compensation) -> Compensation:
    """A predictor where o_proj is and in its dtype, after a look at its shapes."""
    check_shapes(block, {o_proj.tp_rank: predictor}, o_proj.input_size_per_partition, o_proj.output_size)
    return predictor.to(next(o_proj.parameters()))


def _add(a: Tensor, b: Tensor | None) -> Tensor:
    return a if b is None else a + b


def _all_reduce(partial: Tensor) -> Tensor:
    """The sum over all ranks. Works in place on a CPU: `partial` is nobody's afterwards."""
    from vllm.distributed import tensor_model_parallel_all_reduce

    return tensor_model_parallel_all_reduce(partial)
