"""What a checkpoint says of generating text, as far as it belongs to the model and not to how somebody once ran it."""

from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from spd_calib.errors import InputError

from .source import Source

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
KEPT = (
    *TOKENS,
    "max_length",
    "max_new_tokens",
    "min_length",
    "min_new_tokens",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
)
"""Where text ends and which tokens are drawn. Left out is what asks for another search (beams, contrastive search,
assistants), for several texts, for another form of the answer or of the cache: a command generates one text for each
prompt, the likeliest tokens or drawn ones, as it says itself."""


def set_generation_config(source: Source, model: PreTrainedModel) -> None:
    """Set what `model` generates by: KEPT of the folder's generation_config.json, or else of its configuration.

    Raises InputError where that cannot be used.
    """
    path = source.folder / "generation_config.json"
    try:
        said = GenerationConfig.from_pretrained(source.folder) if path.is_file() else model.generation_config
        kept = {name: value for name in KEPT if (value := getattr(said, name, None)) is not None}
        made = GenerationConfig(**kept)
        made.validate()
    except Exception as e:
        first = (str(e).strip().splitlines() or [type(e).__name__])[0].rstrip(".:")
        raise InputError(
            f"The generation_config.json of {source.id} cannot be used: {first}; correct it, or remove it."
        ) from None
    for name in TOKENS:
        if not _token_ids(getattr(made, name)):
            raise InputError(
                f"The generation_config.json of {source.id} says {name} {getattr(made, name)!r}, which is no token id; "
                "correct it, or remove it."
            )
    model.generation_config = made


def _token_ids(value: Any) -> bool:
    """Tell whether `value` is a token id, a list of them, or None."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    return all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids)
