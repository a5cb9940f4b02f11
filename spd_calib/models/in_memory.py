"""A model object that is already in memory: its reference, and a copy that shares its weights."""

import copy
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import remove_tied_weights_from_state_dict, revert_weight_conversion

from spd_calib.errors import InputError
from spd_calib.formats.common import ModelRef

from .fingerprint import config_hash, digest_of_all, tensor_digest
from .generation import keep_own_generation_config
from .tokens import guard_embedding

KINDS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
"""The kinds of number of a weight, as safetensors spells them."""
UNNAMED = "in memory"


def check_in_memory(model: Any) -> None:
    """Raise InputError for an object that is no whole transformers model on one device, in one supported dtype."""
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise InputError(
            f"A {type(model).__name__} is no causal language model of transformers; give one as AutoModelForCausalLM "
            "returns it, adapters merged and not compiled, or the folder or hub id of one."
        )
    if model.config.get_text_config() is not model.config:
        raise InputError(
            f"A {type(model).__name__} in memory has parts beside its language model; name its folder or hub id."
        )
    if getattr(model.config, "quantization_config", None):
        raise InputError("The weights of the model in memory are quantised; name its folder or hub id.")
    places = {str(p.device) for p in model.parameters()}
    if len(places) != 1 or "meta" in places:
        raise InputError(
            f"The weights of the model lie on {' and '.join(sorted(places)) or 'no device'}; load it onto one device."
        )
    kinds = {p.dtype for p in model.parameters()}
    if len(kinds) != 1 or not kinds <= {torch.float32, torch.bfloat16, torch.float16}:
        found = " and ".join(sorted(str(k).removeprefix("torch.") for k in kinds))
        raise InputError(f"The weights of the model are {found}; load it in float32, bfloat16 or float16 alone.")


def check_tensors(model: PreTrainedModel) -> None:
    """Raise InputError unless the model holds exactly the tensors that its configuration describes.

    An adapter, for one, brings others, and a block that was cut off leaves fewer.
    """
    with torch.device("meta"):
        described = type(model)(copy.deepcopy(model.config)).state_dict()
    found = model.state_dict()
    for name in [*found, *described]:
        if name not in described or name not in found or found[name].shape != described[name].shape:
            how = "lacks" if name not in found else "holds"
            raise InputError(
                f"The model {how} {name}, otherwise than its configuration describes; merge adapters into the weights, "
                "and give the configuration that goes with them."
            )


def sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of `model` in eval mode: modules of its own, on the very same parameters and buffers.

    What is done to the copy's modules does not show in `model`, and no weight is in memory twice. Like the models that
    a loader returns, the copy generates by the kept settings alone (generation.py), and refuses token ids beyond its
    embedding.
    """
    shared: list[Tensor] = [*model.parameters(), *model.buffers()]
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in shared}).eval()
    keep_own_generation_config(twin)
    guard_embedding(twin)
    return twin


def ref_in_memory(model: PreTrainedModel) -> ModelRef:
    """Return the model's reference: that of the folder which save_pretrained would write, under the model's name."""
    name = type(model).__name__
    return ModelRef(
        id=model.name_or_path or UNNAMED,
        architecture=name,
        num_blocks=model.config.num_hidden_layers,
        config_hash=config_hash(_saved_config(model)),
        weight_fingerprint=_state_fingerprint(model),
    )


def _saved_config(model: PreTrainedModel) -> dict[str, Any]:
    """Return the configuration as it reads back from the folder that save_pretrained would write."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    return type(config).from_dict(config.to_dict()).to_dict()


def _state_fingerprint(model: PreTrainedModel) -> str:
    """Return fingerprint.weight_fingerprint of the tensors that save_pretrained would write."""
    state = model.state_dict()
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    state = revert_weight_conversion(model, remove_tied_weights_from_state_dict(state, model))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return digest_of_all(pool.map(_digest, state, state.values()))


def _digest(name: str, tensor: Tensor) -> str:
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return tensor_digest(name, dtype=KINDS[tensor.dtype], shape=list(tensor.shape), content=content.numpy().data)
