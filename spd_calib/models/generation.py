"""The settings for generating text that belong to a model, and not to how somebody once ran it."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from spd_calib.errors import InputError

from .source import Source


def _count(value: Any, vocabulary: int) -> bool:
    """Tell whether `value` is a whole number from 0 that fits 32 bits, such as a token id."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _count_from_one(value: Any, vocabulary: int) -> bool:
    """Tell whether `value` is a whole number from 1."""
    return _count(value, vocabulary) and value > 0


def _known_ids(value: Any, vocabulary: int) -> bool:
    """Tell whether `value` is a list of token ids that the model has."""
    return isinstance(value, list) and all(_count(i, vocabulary) and i < vocabulary for i in value)


def _id_or_ids(value: Any, vocabulary: int) -> bool:
    """Tell whether `value` is a token id or a list of them; one that the model does not have is never met."""
    return all(_count(i, vocabulary) for i in (value if isinstance(value, list) else [value]))


def _words(value: Any, vocabulary: int) -> bool:
    """Tell whether `value` is a list of words, each some token ids that the model has."""
    return isinstance(value, list) and bool(value) and all(ids and _known_ids(ids, vocabulary) for ids in value)


def _boolean(value: Any, vocabulary: int) -> bool:
    """Tell whether `value` is true or false."""
    return isinstance(value, bool)


def _positive(value: Any, vocabulary: int) -> bool:
    """Tell whether `value` is a number above 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def _share(value: Any, vocabulary: int) -> bool:
    """Tell whether `value` is a number from 0 to 1."""
    return (value == 0 and not isinstance(value, bool)) or _positive_share(value, vocabulary)


def _positive_share(value: Any, vocabulary: int) -> bool:
    """Tell whether `value` is a number above 0 and up to 1."""
    return _positive(value, vocabulary) and value <= 1


KEPT: dict[str, Callable[[Any, int], bool]] = {
    "bos_token_id": _id_or_ids,
    "eos_token_id": _id_or_ids,
    "pad_token_id": _count,
    "suppress_tokens": _known_ids,
    "begin_suppress_tokens": _known_ids,
    "bad_words_ids": _words,
    "max_length": _count,
    "max_new_tokens": _count_from_one,
    "min_length": _count,
    "min_new_tokens": _count,
    "do_sample": _boolean,
    "temperature": _positive,
    "top_k": _count,
    "top_p": _share,
    "min_p": _share,
    "typical_p": _positive_share,
    "epsilon_cutoff": _share,
    "eta_cutoff": _share,
    "repetition_penalty": _positive,
    "no_repeat_ngram_size": _count,
}
"""Fields that are taken over, and what tells whether a value can be used with a vocabulary of so many tokens:
where text ends and which tokens are drawn. Left out is what asks for another search (beams, contrastive search,
assistants), for more texts than one, for another form of the answer or of the cache: a command generates one
text for each prompt, of the likeliest tokens or of drawn ones, as it says itself."""


def set_generation_config(source: Source, model: PreTrainedModel) -> None:
    """Set what `model` generates by: KEPT of the folder's generation_config.json, or else of its configuration.

    Raises InputError where one of these values cannot be used.
    """
    path = source.folder / "generation_config.json"
    said = _read(source, path) if path.is_file() else vars(model.generation_config)
    _set(model, said, whence=f"The {path.name if path.is_file() else 'configuration'} of {source.id}")


def keep_own_generation_config(model: PreTrainedModel) -> None:
    """Set what a model in memory generates by: KEPT of its own generation_config. Raises InputError as above."""
    _set(model, vars(model.generation_config), whence="The generation_config of the model in memory")


def _set(model: PreTrainedModel, said: Mapping[str, Any], *, whence: str) -> None:
    kept = {name: said[name] for name in KEPT if said.get(name) is not None}
    for name, value in kept.items():
        if not KEPT[name](value, model.config.vocab_size):
            raise InputError(
                f"{whence} says {name} {value!r}, by which no text can be generated; correct it, or remove that line."
            )
    penalty = kept.get("repetition_penalty")
    model.generation_config = GenerationConfig(**kept | ({"repetition_penalty": float(penalty)} if penalty else {}))


def _read(source: Source, path: Path) -> dict[str, Any]:
    """Return what a generation_config.json holds. Raises InputError where that is no JSON object."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise InputError(f"The {path.name} of {source.id} is no JSON object; fetch it again, or remove it.")
    return said
