"""A vLLM decoder layer that drops its sync points (docs/design.md, section 2), and the list of layers of that form.

Names say nothing about what a layer computes (Gemma2 and Granite look like Llama), so the list is of vLLM's own
classes. `x` is the part of the residual stream that all ranks share (after a plain drop: the rank's own), `p` what the
rank still owes the others. Tensors are [N, d], N tokens of all requests in the batch.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spd_calib.errors import InputError
from spd_calib.formats.drops import Drop, Drops, Point, Strategy
from spd_calib.models.predictor import Predictor, check_predictors

KEEP, BLOCK_DROP = Strategy.KEEP_SYNC, Strategy.BLOCK_DROP
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class LayerForm:
    """The places of vLLM's classes of an architecture, and of its parts relative to model and layer.

    `planned(layer, attention=, mlp=, owes=)` gives the forward that takes the place of the layer's own: how its two
    sync points are dropped, and whether the layer before left a debt.
    """

    module: str
    layer: str
    planned: Callable[..., Callable]
    layers: str = "model.layers"
    o: str = "self_attn.o_proj"
    down: str = "mlp.down_proj"
    switches: tuple[tuple[str, Any], ...] = ()  # attributes of the layer that must have these values


def fused(layer: Any, *, attention: Drop, mlp: Drop, owes: bool) -> Callable[..., Pair]:
    """Return a forward of Llama's kind: it takes and gives (hidden, residual), which norms add up as they go.

    Between two layers, hidden is the sum of the MLP before; where that owes its all-reduce, it is the debt p.
    """
    norm1, norm2 = layer.input_layernorm, layer.post_attention_layernorm
    o_bias, down_bias = layer.self_attn.o_proj.bias, layer.mlp.down_proj.bias
    predicts, at_attention, at_mlp = attention.predictors is not None, attention.strategy, mlp.strategy

    def forward(positions: Tensor, hidden_states: Tensor, residual: Tensor | None, **_: Any) -> Pair:
        p = None
        if residual is None:
            u, x = norm1(hidden_states), hidden_states
        elif owes:
            u, x, p = norm1(residual + hidden_states), residual, hidden_states
        else:
            u, x = norm1(hidden_states, residual)

        a = layer.self_attn(positions=positions, hidden_states=u)
        if predicts:
            a, predicted = a.chunk(2, -1)
            x = _add(x, o_bias)
            u, p = norm2(_add(x + predicted, p)), _add(a, p)
        elif at_attention == KEEP:
            (u, x), p = norm2(_add(_all_reduce(_add(a, p)), o_bias), x), None
        elif at_attention == BLOCK_DROP:
            x, p = _add(x, o_bias), _add(a, p)
            u = norm2(x + p)
        elif p is None:
            u, x = norm2(_add(a, o_bias), x)
        else:
            x = _add(x + a, o_bias)
            u = norm2(x + p)

        m = layer.mlp(u)
        if at_mlp == KEEP:
            return _add(_all_reduce(_add(m, p)), down_bias), x
        return _add(m, p), _add(x, down_bias)

    return forward


def unfused(layer: Any, *, attention: Drop, mlp: Drop, owes: bool) -> Callable[..., Tensor | Pair]:
    """Return a forward of OPT's kind: it takes and gives the residual stream alone, or (x, p) where p is owed."""
    norm1, norm2 = layer.self_attn_layer_norm, layer.final_layer_norm
    o_bias, down_bias = layer.self_attn.out_proj.bias, layer.fc2.bias
    predicts, at_attention, at_mlp = attention.predictors is not None, attention.strategy, mlp.strategy

    def forward(hidden_states: Tensor | Pair) -> Tensor | Pair:
        x, p = hidden_states if isinstance(hidden_states, tuple) else (hidden_states, None)
        a = layer.self_attn(hidden_states=norm1(_add(x, p)))
        read = None
        if predicts:
            a, predicted = a.chunk(2, -1)
            x = _add(x, o_bias)
            read, p = _add(x + predicted, p), _add(a, p)
        elif at_attention == KEEP:
            x, p = _add(x + _all_reduce(_add(a, p)), o_bias), None
        elif at_attention == BLOCK_DROP:
            x, p = _add(x, o_bias), _add(a, p)
        else:
            x = _add(x + a, o_bias)

        neurons, _ = layer.fc1(norm2(_add(x, p) if read is None else read))
        m, _ = layer.fc2(layer.activation_fn(neurons))
        if at_mlp == KEEP:
            return _add(x + _all_reduce(_add(m, p)), down_bias)
        return _add(x, down_bias), _add(m, p)

    return forward


def predicting(o_proj: Any, predictor: Predictor) -> Callable[[Tensor], tuple[Tensor, None]]:
    """Return a forward of o_proj that gives the partial sum and, behind it, what the MLP is to read for it: [N, 2d].

    Here alone are the head outputs at hand; the attention hands on what o_proj gives.
    """
    partial_sum = type(o_proj).forward

    def forward(heads: Tensor) -> tuple[Tensor, None]:
        partial, _ = partial_sum(o_proj, heads)
        return torch.cat((partial, predictor(heads, partial)), -1), None

    return forward


_MODELS = "vllm.model_executor.models."
FORMS = {
    "LlamaForCausalLM": LayerForm(_MODELS + "llama", "LlamaDecoderLayer", fused),
    "MistralForCausalLM": LayerForm(
        _MODELS + "mistral", "MistralDecoderLayer", fused, switches=(("ada_rms_norm_t_cond", None),)
    ),
    "Qwen2ForCausalLM": LayerForm(_MODELS + "qwen2", "Qwen2DecoderLayer", fused),
    "Qwen3ForCausalLM": LayerForm(_MODELS + "qwen3", "Qwen3DecoderLayer", fused),
    "GemmaForCausalLM": LayerForm(_MODELS + "gemma", "GemmaDecoderLayer", fused),
    "OPTForCausalLM": LayerForm(
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


def apply(model: nn.Module, drops: Drops) -> None:
    """Make a loaded vLLM model run `drops`, which hold this rank's predictors; undoes what was applied before.

    Layers with nothing to drop keep vLLM's own forward. Raises InputError, before anything is changed, for a model
    that is not on the list, for sync points it does not have, for predictors that do not fit it, and where somebody
    else has put a forward of their own around a layer.
    """
    form, layers = _find(model)
    try:
        drops.check_fits(len(layers))
    except ValueError as e:
        raise InputError(f"The plan does not fit the model that vLLM loaded: {e}.") from None
    for i, layer in enumerate(layers):
        for module in (layer, layer.get_submodule(form.o)):
            _refuse_foreign_forward(module, i)
    predictors = {
        point.block: fitted(layers[point.block].get_submodule(form.o), drops.at(point), block=point.block)
        for point in drops
        if drops.at(point).predictors is not None
    }
    owes = False
    for i, layer in enumerate(layers):
        attention, mlp = drops.at(Point(i, "attention")), drops.at(Point(i, "mlp"))
        dense = attention.strategy == mlp.strategy == KEEP and not owes
        o_proj = layer.get_submodule(form.o)
        for linear in (o_proj, layer.get_submodule(form.down)):
            linear.reduce_results, linear.skip_bias_add = dense, not dense
        _set_forward(o_proj, predicting(o_proj, predictors[i]) if i in predictors else None)
        _set_forward(layer, None if dense else form.planned(layer, attention=attention, mlp=mlp, owes=owes))
        owes = mlp.strategy != KEEP


def count_layers(model: nn.Module) -> int:
    """Return the number of decoder layers of a loaded vLLM model; raises InputError for one that is not on the list."""
    return len(_find(model)[1])


def fitted(o_proj: Any, drop: Drop, *, block: int) -> Predictor:
    """Return this rank's predictor of `drop` where o_proj is and in the dtype that o_proj computes in.

    Raises InputError where there is none for this rank, or where its shapes are not o_proj's.
    """
    assert drop.predictors is not None
    if o_proj.tp_rank not in drop.predictors:
        raise InputError(f"Block {block} has no predictor for rank {o_proj.tp_rank}.")
    own = {o_proj.tp_rank: drop.predictors[o_proj.tp_rank]}
    check_predictors(block, own, d_rank=o_proj.input_size_per_partition, d=o_proj.output_size)
    weight = next(o_proj.parameters())  # which may be packed, so that its dtype says nothing
    return own[o_proj.tp_rank].like(torch.empty(0, device=weight.device, dtype=o_proj.params_dtype))


def _find(model: nn.Module) -> tuple[LayerForm, list[Any]]:
    """Return the model's form and its layers. Raises InputError unless the very classes are vLLM's own."""
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


def _refuse_foreign_forward(module: nn.Module, block: int) -> None:
    """Raise InputError where `module` runs another forward than its class's or one of ours: it would be lost."""
    forward = vars(module).get("forward")
    if forward is not None and not hasattr(forward, "of_spd_calib"):
        raise InputError(
            f"Something has wrapped the forward of block {block}'s {type(module).__name__}, as weight offloading does, "
            "and a plan would take its place; start vLLM without it, or without the plan."
        )


def _set_forward(module: Any, forward: Any) -> None:
    """Make `module` run `forward`; with None, its class's own again."""
    vars(module).pop("forward", None)
    if forward is not None:
        forward.of_spd_calib = True
        module.forward = forward


def _add(a: Tensor, b: Tensor | None) -> Tensor:
    return a if b is None else a + b


def _all_reduce(partial: Tensor) -> Tensor:
    """Return the sum over all ranks. Works in place on a CPU: `partial` is nobody's afterwards."""
    from vllm.distributed import tensor_model_parallel_all_reduce

    return tensor_model_parallel_all_reduce(partial)
