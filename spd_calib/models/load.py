"""From MODEL as a user names it to a dense model, its tokenizer and its reference."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from spd_calib.errors import InputError
from spd_calib.formats.common import ModelRef

from .architecture import HeadCounts, check_divides
from .fingerprint import config_hash, weight_fingerprint
from .probe import find_layers

MAX_JSON_BYTES = 256 * 2**20  # the largest tokenizer.json known has 40 MB
MAX_BLOCKS = 1024  # eight times the deepest model known; a block more is a module more before any weight is read
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Source:
    """Where a model's files lie."""

    id: str  # as the user named it
    folder: Path
    revision: str | None


def locate(model: str, revision: str | None = None) -> Source:
    """Find MODEL: a local folder, or a hub id whose files are then fetched (safetensors, configuration, tokenizer).

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
    for path in sorted(source.folder.glob("*.json")):
        if path.is_file() and path.stat().st_size > MAX_JSON_BYTES:
            raise InputError(f"{path} is larger than {MAX_JSON_BYTES >> 20} MiB: it is no {path.name}; fetch it again.")
    return source


def _fetch(model: str, revision: str | None) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    wanted = ["*.safetensors", "*.json", "*.model", "*.txt"]
    try:
        return snapshot_download(model, revision=revision, allow_patterns=wanted)
    except GatedRepoError:
        raise InputError(
            f"{model} is gated on the hub: accept its terms there and log in with `hf auth login`."
        ) from None
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise InputError(f"The hub knows no model {model!r} (or it is private); check the name or log in.") from None
    except HFValidationError:
        raise InputError(f"{model!r} is neither a local folder nor a hub id such as org/name.") from None
    except Exception as e:  # whatever the network does, the way out is the same
        raise InputError(
            f"{model!r} is no local folder, and the model hub cannot be reached to fetch it ({type(e).__name__}); "
            "name a local folder, or try again with a network."
        ) from None


def read_config(source: Source):
    """The model's configuration. Raises InputError where transformers cannot use it, or would run or read what the
    fingerprint does not speak of: code, an adapter, weights under another name."""
    transformers_logging.set_verbosity_error()  # what it warns of here is checked, or no concern of the user's
    transformers_logging.disable_progress_bar()
    try:
        # left out, transformers asks on the terminal, and a "y" there would run what the folder holds
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    except Exception as e:
        if "trust_remote_code" in str(e):
            raise InputError(
                f"{source.id} comes with code of its own, which spd-calib never runs; "
                "name a model whose architecture is part of transformers."
            ) from None
        raise InputError(f"The configuration of {source.id} cannot be used: {_first_line(e)}.") from None
    _refuse_what_it_calls_in(source, config)
    return config


def _refuse_what_it_calls_in(source: Source, config) -> None:
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


def model_ref(source: Source, config) -> ModelRef:
    """The reference that stands in every file; reads every weight once to fingerprint it."""
    return ModelRef(
        id=source.id,
        revision=source.revision,
        architecture=(config.architectures or [type(config).__name__])[0],
        num_blocks=config.num_hidden_layers,
        config_hash=config_hash(config.to_dict()),
        weight_fingerprint=weight_fingerprint(source.folder),
    )


def check_config(config, tp: int) -> None:
    """Refuse, before any weight is read, a model whose form is not supported or that `tp` does not divide."""
    if quantised := getattr(config, "quantization_config", None):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise InputError(
            f"This checkpoint is quantised ({method or 'its configuration says so'}), which is not supported; "
            "name the one it was made from, in float32, bfloat16 or float16."
        )
    if not 1 <= config.num_hidden_layers <= MAX_BLOCKS:
        raise InputError(
            f"Its configuration says num_hidden_layers {config.num_hidden_layers}, and a model that can be used has "
            f"1 to {MAX_BLOCKS}; fetch the model again."
        )
    try:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as e:
        raise InputError(
            f"transformers has no causal language model for this configuration: {_first_line(e)}."
        ) from None
    for parts in find_layers(skeleton):
        check_divides(HeadCounts.of(parts), tp)


def load_dense(source: Source, config, device: str, dtype: str) -> PreTrainedModel:
    """The dense model in eval mode. Raises InputError where its weights cannot be read or the device is not there."""
    check_device(device)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.folder,
            config=config,
            dtype=DTYPES[dtype],
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
        model = model.to(torch.device(device)).eval()  # type: ignore[arg-type]
    except torch.OutOfMemoryError:
        raise InputError(
            f"{source.id} does not fit on {device} in {dtype}; use more ranks or --dtype bfloat16."
        ) from None
    except Exception as e:
        raise InputError(f"The weights of {source.id} cannot be loaded: {_first_line(e)}.") from None
    for name, weight in model.named_parameters():
        check_weight(source.id, name, weight)
    return model


@torch.no_grad()
def check_weight(model: str, name: str, weight: torch.Tensor) -> None:
    """Raises InputError, naming the block, where a weight holds NaN or Inf: attention may turn them into a plain 0."""
    if weight.sum().isfinite() or weight.isfinite().all():  # of finite numbers, too, the sum may overflow
        return
    block = re.search(r"\.(\d+)\.", name)
    where = f"block {block[1]}, {name}" if block else name
    raise InputError(f"The weights of {model} hold NaN or Inf, first in {where}; fetch the model again.")


def check_device(device: str) -> None:
    """Raises InputError for a device that is not there."""
    try:
        torch.empty(1, device=device)
    except Exception:
        raise InputError(f"The device {device!r} cannot be used here; choose another with --device.") from None


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False)
    except Exception as e:
        if "trust_remote_code" in str(e):
            raise InputError(
                f"The tokenizer of {source.id} comes with code of its own, which spd-calib never runs; "
                "save it in the form of tokenizer.json."
            ) from None
        raise InputError(f"The tokenizer of {source.id} cannot be loaded: {_first_line(e)}.") from None


def _first_line(e: Exception) -> str:
    first, *rest = str(e).strip().splitlines() or [type(e).__name__]
    return (f"{first} {rest[0].strip()}" if first.endswith(":") and rest else first).rstrip(".")
