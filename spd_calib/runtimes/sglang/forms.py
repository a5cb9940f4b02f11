"""The list of SGLang's decoder layers that can drop their sync points.

Names say nothing about what a layer computes, so the list is of SGLang's own classes. All of them compute
h = x + attn(norm1(x)), y = h + mlp(norm2(h)), call their parts by the same names, and leave every sum over ranks to the
two stage boundaries of the layer.
"""

from typing import Any

from spd_calib.errors import InputError

FORMS = {
    "LlamaForCausalLM": ("llama.LlamaForCausalLM", "llama.LlamaDecoderLayer"),
    "Qwen2ForCausalLM": ("qwen2.Qwen2ForCausalLM", "qwen2.Qwen2DecoderLayer"),
    "Qwen3ForCausalLM": ("qwen3.Qwen3ForCausalLM", "qwen3.Qwen3DecoderLayer"),
}
"""The allow-list: an architecture -> SGLang's classes of its model and its layers, below sglang.srt.models."""

MODELS = "sglang.srt.models"
LINEAR = "sglang.srt.layers.linear.RowParallelLinear"
BOUNDARY = "sglang.srt.layers.layer_boundary.stage.StageBoundary"
UNQUANTISED = "sglang.srt.layers.quantization.unquant.UnquantizedLinearMethod"


def find(model: Any) -> list[Any]:
    """Return the layers of a loaded SGLang model.

    Raises InputError unless the very classes are those of the list, and its projections leave their sums open.
    """
    layer_class = next((layer for of, layer in FORMS.values() if f"{MODELS}.{of}" == _place(model)), None)
    if layer_class is None:
        raise InputError(f"SGLang loaded {_place(model)}: its layers are not known.")
    layers = list(model.model.layers)
    for i, layer in enumerate(layers):
        if _place(layer) != f"{MODELS}.{layer_class}":
            raise InputError(f"SGLang loaded a {_place(layer)} where a {MODELS}.{layer_class} is expected.")
        for boundary in (layer.attn_boundary, layer.ffn_boundary):
            if _place(boundary) != BOUNDARY:
                raise InputError(f"SGLang sums over the ranks of block {i} by {_place(boundary)}: no plan.")
            if boundary.declaration.row_transport is not None:
                raise InputError(f"SGLang moves tokens between the ranks of block {i}: no plan.")
        for linear in linears(layer):
            _check_linear(linear, i)
    return layers


def linears(layer: Any) -> tuple[Any, Any]:
    """Return o_proj and down_proj of a layer, behind each of which there is a sync point."""
    return layer.self_attn.o_proj, layer.mlp.down_proj


def check_widths(model: Any, config: Any, *, tp: int) -> None:
    """Raise InputError where a rank's projections are not an even part of those that `config` asks for.

    On a CPU SGLang pads heads and neurons where that suits its kernels; its ranks then have others than the plan's.
    """
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    expected = config.num_attention_heads * head, config.intermediate_size
    for layer in find(model):
        found = tuple(linear.input_size_per_partition * tp for linear in linears(layer))
        if found != expected:
            raise InputError(
                f"SGLang pads what its {tp} ranks share here, {expected} heads' values and neurons to {found}, so that "
                "its ranks have others than those the plan was measured with: no plan."
            )


def _check_linear(linear: Any, block: int) -> None:
    """Raise InputError where a projection does not give its rank's partial sum, with its bias on rank 0."""
    if _place(linear) != LINEAR:
        raise InputError(f"A {_place(linear)} is no {LINEAR}: the sync point of block {block} is not known.")
    found = (
        ("is quantised", _place(linear.quant_method) != UNQUANTISED),
        ("reads what is gathered first", not linear.input_is_parallel),
        ("sums over the ranks itself", linear.reduce_results or linear.use_decode_attn_tp),
        ("leaves its bias to others", linear.skip_bias_add),
    )
    if why := next((why for why, used in found if used), None):
        raise InputError(f"In SGLang a projection of block {block} {why}: no plan.")


def _place(thing: Any) -> str:
    return f"{type(thing).__module__}.{type(thing).__name__}"
