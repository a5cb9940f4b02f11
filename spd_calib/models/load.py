"""From MODEL as a user names it to a dense model, its tokenizer and its reference."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from spd_calib.errors import InputError
from spd_calib.formats.common import ModelRef

from .architecture import HeadCounts, check_divides
from .checkpoint import Checkpoint, account, check_weight, refuse_not_finite
from .config_checks import (
    choose_attention,
    first_line,
    one_line,
    refuse_other_kinds,
    refuse_what_it_calls_in,
    warnings_of_rope,
)
from .fill import fill
from .fingerprint import config_hash, weight_fingerprint
from .generation import set_generation_config
from .probe import find_layers
from .schemes import scheme_of
from .source import Source
from .text_part import text_config, whole_of
from .tokens import guard_embedding

MAX_JSON_BYTES = 256 * 2**20  # the largest tokenizer.json known has 40 MB
MAX_BLOCKS = 1024  # eight times the deepest model known; a block more is a module more before any weight is read
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def locate(model: str, revision: str | None = None) -> Source:
    """Return where MODEL lies: a local folder, or the files of a hub id, which are then fetched.

    Fetched are weights in safetensors, configuration and tokenizer.

    Raises InputError where it is neither, the hub cannot be reached, or a JSON file in it is too large to be one.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"{model} holds no config.json; name the folder of a transformers checkpoint.")
        return _of_plain_size(Source(model, path, None))
    if path.exists() or model.count("/") > 1 or model.startswith((".", "/", "~")):
        raise InputError(f"There is no model folder {model}; name a local folder or a hub id such as org/name.")
    folder = Path(_fetch(model, revision))
    return _of_plain_size(Source(model, folder, folder.name))  # the hub's cache names a snapshot by its commit


def _of_plain_size(source: Source) -> Source:
    """Return `source`. Raises InputError for a JSON file in it that is too large to be one."""
    for path in sorted(source.folder.glob("*.json")):
        if path.is_file() and path.stat().st_size > MAX_JSON_BYTES:
            raise InputError(f"{path} is larger than {MAX_JSON_BYTES >> 20} MiB: it is no {path.name}; fetch it again.")
    return source


def _fetch(model: str, revision: str | None) -> str:
    """Return the folder that the hub's files of a model were fetched to. Raises InputError where they cannot be."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    wanted = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
    try:
        return snapshot_download(model, revision=revision, allow_patterns=wanted)
    except GatedRepoError:
        raise InputError(
            f"{model} is gated on the hub: accept its terms there and log in with `hf auth login`."
        ) from None
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise InputError(f"The hub knows no model {model!r} (or it is private); check the name or log in.") from None
    except HFValidationError:
        raise InputError(
            f"{model!r} is neither a local folder nor a hub id such as org/name; name one of them as `model`."
        ) from None
    except Exception as e:  # whatever the network does, the way out is the same
        raise InputError(
            f"{model!r} is no local folder, and the model hub cannot be reached to fetch it ({type(e).__name__}); "
            "name a local folder, or try again with a network."
        ) from None


def read_config(source: Source) -> Any:
    """Return the model's configuration, as transformers reads it; of a multimodal model that of its text part.

    Raises InputError where transformers cannot use it, where it is of several models of text, and where it would run
    or read what the fingerprint does not speak of: code, an adapter, weights under another name.
    """
    transformers_logging.set_verbosity_error()  # what it warns of here is checked, or no concern of the user's
    transformers_logging.disable_progress_bar()
    try:
        # left out, transformers asks on the terminal, and a "y" there would run what the folder holds
        with warnings_of_rope() as doubts:
            config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    except Exception as e:
        if "trust_remote_code" in str(e):
            raise InputError(
                f"{source.id} comes with code of its own, which spd-calib never runs; "
                "name a model whose architecture is part of transformers."
            ) from None
        raise InputError(f"The configuration of {source.id} cannot be used: {first_line(e)}.") from None
    if wrong := [said for said in doubts if "field must" in said]:  # others are advice
        raise InputError(
            f"The configuration of {source.id} cannot be used: {one_line(wrong[0])}; correct its config.json."
        )
    refuse_what_it_calls_in(source, config)
    config = text_config(source, config)
    refuse_other_kinds(source, config)
    choose_attention(config)
    return config


def model_ref(source: Source, config: Any) -> ModelRef:
    """Return the reference that stands in every file; reads every weight once to fingerprint it.

    Raises InputError where the folder's tensors are not those of the model that its configuration describes.
    """
    return ModelRef(
        id=source.id,
        revision=source.revision,
        architecture=(whole_of(config).architectures or [type(whole_of(config)).__name__])[0],
        num_blocks=config.num_hidden_layers,
        config_hash=config_hash(whole_of(config).to_dict()),
        weight_fingerprint=checked_fingerprint(source, config),
        quantised=scheme.words if (scheme := scheme_of(config)) else None,
    )


def checked_fingerprint(source: Source, config: Any) -> str:
    """Return the fingerprint of the folder's weights, once `account` has found them to be the model's.

    What a runtime compares before it serves a plan. Raises InputError as `account` and `weight_fingerprint` do.
    """
    account(source, skeleton(source, config))
    return weight_fingerprint(source.folder)


def check_config(config: Any, tp: int) -> None:
    """Raise InputError, before any weight is read, for a form that is not supported or that `tp` does not divide.

    A scheme of quantisation that cannot be read exactly is such a form.
    """
    scheme_of(config)
    for parts in find_layers(_on_meta(config, torch.float32)):
        check_divides(HeadCounts.of(parts), tp)


def _on_meta(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """Return transformers' causal language model of a configuration on the meta device, in eval mode."""
    if not 1 <= config.num_hidden_layers <= MAX_BLOCKS:
        raise InputError(
            f"Its configuration says num_hidden_layers {config.num_hidden_layers}, and a model that can be used has "
            f"1 to {MAX_BLOCKS}; fetch the model again."
        )
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False).eval()
    except Exception as e:
        raise InputError(
            f"transformers has no causal language model for this configuration: {first_line(e)}."
        ) from None


def skeleton(source: Source, config: Any, *, dtype: str = "float32") -> PreTrainedModel:
    """Return the model in eval mode on the meta device: everything but its weights.

    Raises InputError where transformers has no such model, or for a generation_config.json that cannot be used.
    """
    return _prepared(source, _on_meta(config, DTYPES[dtype]))


def _prepared(source: Source, model: PreTrainedModel) -> PreTrainedModel:
    """Return `model`, set up as every loader does: how it generates, and that it refuses ids beyond its embedding."""
    set_generation_config(source, model)
    guard_embedding(model)
    return model


def load_dense(source: Source, config: Any, *, device: str, dtype: str) -> PreTrainedModel:
    """Return the dense model in eval mode, its weights in `dtype` (a name of DTYPES) on `device`.

    Quantised weights are dequantised. Raises InputError where the folder's tensors are not the model's, do not fit, or
    the device is not there.
    """
    check_device(device)
    model = skeleton(source, config, dtype=dtype)
    stored = Checkpoint(source, model)
    too_large = f"{source.id} does not fit on {device} in {dtype}; use more ranks or a narrower dtype."
    # of a quantised model transformers would run kernels, or dequantise, of its own; of a multimodal one all parts
    if scheme_of(config) is not None or whole_of(config) is not config:
        with refusing_unreadable(source, too_large):
            fill(model, stored, own={}, device=device, dtype=DTYPES[dtype])
        return model
    with refusing_unreadable(source, too_large):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.folder,
            config=config,
            dtype=DTYPES[dtype],
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            generation_config=GenerationConfig(),  # not the folder's: see set_generation_config
        )
        model, info = loaded
        model = model.to(torch.device(device)).eval()
    if wrong := [(what, names) for what, names in info.items() if names]:  # two definitions that should be one
        what, names = wrong[0]
        raise InputError(
            f"transformers reads the weights of {source.id} otherwise than spd-calib ({what}: "
            f"{sorted(names, key=str)[0]}); save the model anew with save_pretrained."
        )
    for name, weight in model.named_parameters():
        check_weight(name, weight, model=source.id)
    for name, buffer in model.named_buffers():
        refuse_not_finite(name, buffer, model=source.id)
    return _prepared(source, model)


@contextmanager
def refusing_unreadable(source: Source, too_large: str) -> Iterator[None]:
    """Turn what goes wrong while weights are read into an InputError: `too_large` where memory is short."""
    try:
        yield
    except InputError:
        raise
    except (torch.OutOfMemoryError, MemoryError):
        raise InputError(too_large) from None
    except Exception as e:
        raise InputError(f"The weights of {source.id} cannot be loaded: {first_line(e)}.") from None


def check_device(device: str) -> None:
    """Raise InputError for a device that is not there."""
    try:
        torch.empty(1, device=device)
    except Exception:
        raise InputError(f"The device {device!r} cannot be used here; choose another.") from None


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer. Raises InputError where there is none that can be used without running code."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False)
        _try_tokenizer(tokenizer)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # a panic of the tokenizers library is no Exception
        if "trust_remote_code" in str(e):
            raise InputError(
                f"The tokenizer of {source.id} comes with code of its own, which spd-calib never runs; "
                "save it in the form of tokenizer.json."
            ) from None
        raise InputError(f"The tokenizer of {source.id} cannot be loaded: {first_line(e)}.") from None
    return tokenizer


def _try_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Use a tokenizer in each way the commands do: what is wrong with its files may show here only."""
    encoded = tokenizer("A word, 2.\n", return_tensors="pt")
    if (names := {"input_ids", "attention_mask"} - set(encoded)) or encoded["input_ids"].dim() != 2:
        raise ValueError(f"it gives no {min(names)}" if names else "it gives no token ids")
    tokenizer("A word, 2.\n", truncation=True, max_length=2)
    tokenizer.decode(encoded["input_ids"][0], skip_special_tokens=True)
