"""The options of lm-eval, under its own names and with its own defaults."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from spd_calib.errors import InputError

MODEL_ARGUMENTS = (
    "add_bos_token",
    "chat_template_args",
    "enable_thinking",
    "logits_cache",
    "max_length",
    "mixed_precision_dtype",
    "prefix_token_id",
    "softmax_dtype",
    "think_end_token",
    "truncation",
)
"""Arguments of lm-eval's model `hf` that mean something for a model already loaded; it ignores others silently."""


@dataclass(frozen=True)
class Seeds:
    """The seeds of lm-eval's random numbers; the defaults are lm-eval's."""

    python: int = 0
    numpy: int = 1234
    torch: int = 1234
    fewshot: int = 1234


@dataclass(frozen=True)
class EvalOptions:
    """The options of `lm_eval run`; with the defaults, the dense score is that of `lm_eval run --model hf`.

    `limit` is a number of documents a task or, below 1, a share of them. `samples` names the documents of each task by
    their indices instead. `num_fewshot` leaves alone a task whose own configuration says 0, as lm-eval does.
    `fewshot_as_multiturn` follows `apply_chat_template` where it is None. `model_args` are those of MODEL_ARGUMENTS.
    The batch size alone differs from lm-eval's default (1): it changes no number but by rounding.

    Raises InputError for a value that cannot be used.
    """

    limit: int | float | None = None
    samples: Mapping[str, Sequence[int]] | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool | None = None
    system_instruction: str | None = None
    gen_kwargs: Mapping[str, Any] = field(default_factory=dict)
    model_args: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    seeds: Seeds = Seeds()
    batch_size: int | Literal["auto"] = 8
    max_batch_size: int = 64

    def __post_init__(self) -> None:
        if self.limit is not None and not (0 < self.limit < 1 or (self.limit >= 1 and float(self.limit).is_integer())):
            raise InputError(
                f"A limit of {self.limit} documents cannot be used; give a whole number of 1 or more, a share below 1, "
                "or none."
            )
        if self.limit is not None and self.samples is not None:
            raise InputError("Documents are named by their indices or bounded by a limit, not both; leave one out.")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise InputError(f"{self.num_fewshot} few-shot examples cannot be shown; give 0 or more.")
        if self.fewshot_as_multiturn and not self.apply_chat_template:
            raise InputError("Few-shot examples as turns of a conversation need the chat template; apply it, too.")
        if self.batch_size != "auto" and not (isinstance(self.batch_size, int) and self.batch_size >= 1):
            raise InputError(f"A batch of {self.batch_size} requests cannot be run; give 1 or more, or auto.")
        if unknown := sorted(set(self.model_args) - set(MODEL_ARGUMENTS)):
            known = ", ".join(MODEL_ARGUMENTS)
            raise InputError(f"The model takes no argument {unknown[0]!r} of lm-eval; it takes {known}.")

    @property
    def multiturn(self) -> bool:
        """Tell whether each few-shot example becomes a turn of the conversation."""
        return self.apply_chat_template if self.fewshot_as_multiturn is None else self.fewshot_as_multiturn


def parse_arguments(text: str | None, name: str) -> dict[str, Any]:
    """Read "key=value,key=value", or a JSON object, as lm-eval's command line does; `name` says what they are of.

    None gives none. Raises InputError for text that is neither.
    """
    from lm_eval._cli.utils import key_val_to_dict, try_parse_json

    try:
        found = try_parse_json(text or "{}")
        arguments = found if isinstance(found, dict) else key_val_to_dict(text or "")
        json.dumps(arguments, allow_nan=False)  # they go into the file of results
    except (TypeError, ValueError, RecursionError):
        raise InputError(f"The {name} {text!r} are neither key=value,key=value nor a JSON object.") from None
    return arguments


def parse_seeds(text: str) -> Seeds:
    """Read lm-eval's seeds: one number for all four, or python,numpy,torch[,fewshot].

    Raises InputError for anything else, and for lm-eval's None: without a seed no run can be repeated.
    """
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 3, 4) or not all(0 <= n < 2**32 for n in numbers):
        raise InputError(
            f"The seed {text!r} cannot be used; give one whole number, or four with commas: for Python, NumPy, torch "
            "and the few-shot examples."
        )
    return Seeds(*numbers * (4 if len(numbers) == 1 else 1))


def parse_limit(text: str | None) -> int | float | None:
    """Read a number of documents, or a share of them below 1; None is none. Raises InputError for anything else."""
    try:
        return text if text is None else int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise InputError(f"The limit {text!r} is no number of documents.") from None


def parse_bool(text: str | None, name: str) -> bool | None:
    """Read true or false for the parameter `name`; None is neither. Raises InputError for anything else."""
    values = {"true": True, "false": False, None: None}
    key = text if text is None else text.lower()
    if key not in values:
        raise InputError(f"{name} is {text!r}, which is neither true nor false.")
    return values[key]


def parse_batch_size(text: str) -> int | Literal["auto"]:
    """Read a number of requests, or "auto". Raises InputError for anything else."""
    try:
        return "auto" if text == "auto" else int(text)
    except ValueError:
        raise InputError(f"The batch size {text!r} is neither a whole number nor auto.") from None


def parse_samples(text: str | None) -> dict[str, list[int]] | None:
    """Read lm-eval's samples: a JSON object of document indices by task, or the path of a file of one; None is none.

    Raises InputError for anything else.
    """
    if text is None:
        return None
    try:
        found = json.loads(text if text.lstrip().startswith("{") else Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not found or not all(map(_is_indices, found.values())):
        raise InputError(f'The samples {text!r} are no JSON object such as {{"task": [0, 1]}}, nor a file of one.')
    return {task: sorted(set(indices)) for task, indices in found.items()}


def _is_indices(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(i) is int and i >= 0 for i in value)
