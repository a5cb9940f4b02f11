"""Refusing, with the reason and before a model is built, what a configuration may not say."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from spd_calib.errors import InputError

from .source import Source

PARTS = ("text_config", "vision_config", "audio_config", "text_encoder", "decoder", "generator")
"""Held by the configuration of a model of several parts beside, or instead of, that of a language model."""


@contextmanager
def warnings_of_rope() -> Iterator[list[str]]:
    """Collect what transformers warns of in rotary parameters: it goes on with values that it says are wrong."""
    said: list[str] = []
    handler, logger = logging.Handler(logging.WARNING), logging.getLogger("transformers.modeling_rope_utils")
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def refuse_what_it_calls_in(source: Source, config: Any) -> None:
    """Raise InputError for a folder with which transformers would load, or run, more than its weights."""
    if (source.folder / "adapter_config.json").exists():  # transformers would load it, or the base model it names
        raise InputError(f"{source.id} holds an adapter (adapter_config.json); merge it into the weights first.")
    kernels = [v for k, v in vars(config).items() if "attn_implementation" in k and isinstance(v, str) and "/" in v]
    if kernels:  # transformers would fetch it from the hub and run it
        raise InputError(
            f"The configuration of {source.id} asks for the kernel {kernels[0]}, which is code and never run; "
            "remove attn_implementation from its config.json."
        )
    if getattr(config, "transformers_weights", None):
        raise InputError(
            f"The configuration of {source.id} names other weights (transformers_weights) than model.safetensors; "
            "remove that line, or save the model anew."
        )


def choose_attention(config: Any) -> None:
    """Set the implementation of attention that transformers says a configuration needs.

    PyTorch's own (sdpa) leaves a soft cap of the attention's scores (Gemma 2) out without a word.
    """
    if getattr(config, "attn_logit_softcapping", None) is not None:
        config._attn_implementation = "eager"


def refuse_other_kinds(source: Source, config: Any) -> None:
    """Raise InputError unless the configuration is that of one decoder, its sizes whole numbers."""
    if parts := [part for part in PARTS if getattr(config, part, None) is not None]:
        raise InputError(
            f"{source.id} is a model of several parts ({config.model_type} has {parts[0]}), of text and images or "
            "sound, which is not supported; name a checkpoint of a language model alone."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"{source.id} is an encoder and a decoder (is_encoder_decoder), which is not supported; name a decoder."
        )
    for name in ("num_hidden_layers", "vocab_size", "max_position_embeddings", "hidden_size", "num_attention_heads"):
        value = getattr(config, name, None)
        if value is None:
            raise InputError(f"The configuration of {source.id} ({config.model_type}) has no {name}: not supported.")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(
                f"The configuration of {source.id} says {name} {value!r}, and a model that can be used has a number of "
                "1 or more there; fetch the model again."
            )
    named = config.architectures
    if named is not None and not (isinstance(named, list) and named and all(isinstance(n, str) for n in named)):
        raise InputError(
            f"The configuration of {source.id} says architectures {named!r}, which are no names; fetch the model again."
        )


def first_line(e: BaseException) -> str:
    """Return the first line of an exception's message, with the next where it ends in a colon."""
    return one_line(str(e)) or type(e).__name__


def one_line(text: str) -> str:
    """Return the first line of a message without its full stop, with the next where it ends in a colon."""
    first, *rest = text.strip().splitlines() or [""]
    return (f"{first} {rest[0].strip()}" if first.endswith(":") and rest else first).rstrip(".")
