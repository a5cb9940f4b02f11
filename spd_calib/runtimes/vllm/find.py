"""Finding the form of a loaded vLLM model's layers, or one sentence why they can run no plan."""

from typing import Any

from torch import nn

from spd_calib.errors import InputError
from spd_calib.models.layer_names import LAYERS

from .forms import BACKEND, BY_TRANSFORMERS, FORMS, WITH_LANGUAGE_MODEL
from .forwards import transformers_layer, unfused
from .layer_form import LayerForm
from .mixtures import check_mixture


def find(model: nn.Module) -> tuple[LayerForm, list[Any]]:
    """Return the form of a loaded vLLM model's layers, and the layers.

    Raises InputError unless the very classes are those of the list.
    """
    model = language_model_of(model)
    form = _form_of(model)
    for name, read in form.configured:
        value = read(model.config) if callable(read) else read
        if (found := getattr(model.config, name, value)) != value:
            raise InputError(f"vLLM would leave out what its configuration asks for by {name} = {found}: no plan.")
    layers = list(model.get_submodule(form.layers).children())
    for layer in layers:
        if _place(layer) != form.layer:
            raise InputError(f"vLLM loaded a {_place(layer)} where a {form.layer} is expected.")
        if any(getattr(layer, name) != value for name, value in form.switches):
            raise InputError(
                f"This {type(layer).__name__} is not h = x + attn(norm1(x)), y = h + mlp(norm2(h)): no plan."
            )
        for linear in form.linears(layer):
            path = next(name for name, module in layer.named_modules() if module is linear)
            if type(linear).__name__ != "RowParallelLinear":
                raise InputError(f"The layer's {path} is no RowParallelLinear: its sync point is not known.")
            if not linear.input_is_parallel:
                raise InputError(f"vLLM gathers what the layer's {path} reads, so that no rank has a share of its own.")
            if getattr(linear, "use_w4a8", False):
                raise InputError(
                    f"vLLM would round what the layer's {path} reads to 8 bits, as it does for 4-bit weights on a CPU "
                    "like this, and that was not measured; start it with VLLM_CPU_INT4_W4A8=0."
                )
        if (mixture := form.mixture_of(layer)) is not None:
            check_mixture(mixture, block=layers.index(layer), routers=form.routers)
    return form, layers


def language_model_of(model: Any) -> Any:
    """Return the language model in a loaded vLLM model of text and images; any other model itself."""
    inside = _place(model).removeprefix("vllm.model_executor.models.") in WITH_LANGUAGE_MODEL.values()
    return model.language_model if inside else model


def _form_of(model: Any) -> LayerForm:
    place = _place(model)
    if place.rpartition(".")[2] == BACKEND and place.startswith("vllm."):
        architecture = (model.config.architectures or [""])[0]
        if architecture in BY_TRANSFORMERS:
            return _form_by_transformers(place, architecture, model.config)
    for form in FORMS.values():
        if form.model == place:
            return form
    raise InputError(f"vLLM loaded {place}: its layers are not known.")


def _form_by_transformers(place: str, architecture: str, config: Any) -> LayerForm:
    """Return the form of transformers' layers of an architecture, whose parts have the names that its row says."""
    row = next(names for names in LAYERS.values() if architecture in names.classes)
    module = type(config).__module__.replace(".configuration_", ".modeling_")
    layer = f"{module}.{architecture.removesuffix('ForCausalLM')}DecoderLayer"
    return LayerForm(
        place, layer, unfused(transformers_layer), norm1=row.norm1, norm2=row.norm2, o=row.o, down=row.down
    )


def _place(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"
