"""The language model inside a model of text and images: found, accounted for with the whole, and run on text alone.

Reading text, such a model is its language model, and the rest of its weights are not used. That has been looked at for
each class in WITH_TEXT_PART, on small models; others do more to text than their language model does (a prefix that is
read in both directions, positions in three dimensions), and are refused.
"""

import copy
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel

from spd_calib.errors import InputError

from .config_checks import first_line
from .source import Source

WITH_TEXT_PART = (
    "Gemma3ForConditionalGeneration",
    "Gemma4ForConditionalGeneration",
    "InternVLForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration",
    "Mistral3ForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration",
    "VipLlavaForConditionalGeneration",
)
"""Classes whose forward, given text alone, is that of their language model."""


def text_config(source: Source, config: Any) -> Any:
    """Return the configuration of the language model in that of a multimodal model; `config` itself elsewhere.

    The one returned knows the other, as `whole`. Raises InputError for a class that is not in WITH_TEXT_PART.
    """
    text = config.get_text_config(decoder=True)
    if text is config or getattr(config, "vision_config", None) is None:
        return config
    (named,) = [*(config.architectures or ()), type(config).__name__][:1]
    if named not in WITH_TEXT_PART:
        raise InputError(
            f"{source.id} is a model of text and images ({named}), and what it does to text beside its language model "
            "is not known to this tool; name a checkpoint of the language model alone."
        )
    text = copy.deepcopy(text)  # the one inside `config` stays as it is: it does not know of the whole
    text.whole = config
    return text


def whole_of(config: Any) -> Any:
    """Return the configuration that lies in the model's folder: the multimodal one, for the text part of one."""
    return getattr(config, "whole", None) or config


def whole_skeleton(source: Source, config: Any) -> PreTrainedModel:
    """Return the multimodal model of a configuration on the meta device. Raises InputError where there is none."""
    try:
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(config, trust_remote_code=False).eval()
    except Exception as e:
        raise InputError(f"The configuration of {source.id} cannot be used: {first_line(e)}.") from None


def names_in_whole(text: PreTrainedModel, whole: PreTrainedModel) -> dict[str, str]:
    """Return the name in the multimodal model of each of the language model's tensors, by its own name.

    Raises InputError unless the multimodal model holds exactly one module of the language model's class, and a tensor
    of the same shape for each of its own.
    """
    trunk = type(text.base_model)
    paths = [path for path, module in whole.named_modules() if type(module) is trunk]
    if len(paths) != 1:
        raise InputError(
            f"{type(whole).__name__} holds {len(paths) or 'no'} modules of the class {trunk.__name__}, where its "
            "language model should be one; name a checkpoint of the language model alone."
        )
    prefix, found = text.base_model_prefix, {}
    held = whole.state_dict()
    for name, tensor in text.state_dict().items():
        other = f"{paths[0]}{name.removeprefix(prefix)}" if name.startswith(f"{prefix}.") else name
        if other not in held or held[other].shape != tensor.shape:
            raise InputError(f"{type(whole).__name__} has no {name} as its language model has it: not supported.")
        found[name] = other
    return found
