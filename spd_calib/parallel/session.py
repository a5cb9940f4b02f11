"""One model, opened for work: on simulated ranks in this process."""

from dataclasses import dataclass

import torch
import transformers
from transformers import PreTrainedTokenizerBase

from spd_calib.errors import InputError
from spd_calib.formats.common import ModelRef
from spd_calib.models.load import check_config, load_dense, load_tokenizer, locate, model_ref, read_config

from .model import TensorParallelLM


@dataclass(frozen=True)
class Session:
    lm: TensorParallelLM
    tokenizer: PreTrainedTokenizerBase
    ref: ModelRef
    max_length: int  # tokens, the longest sequence the model can read


def open_session(
    model: str, tp: int, device: str = "cpu", dtype: str = "float32", seed: int = 0, expected: ModelRef | None = None
) -> Session:
    """Load MODEL on `tp` ranks. `expected` is the reference a file holds: raises InputError for another model.

    Refuses, before the weights are read, a model whose form is not supported or that `tp` does not divide.
    """
    torch.manual_seed(seed)
    source = locate(model, expected.revision if expected else None)
    config = read_config(source)
    check_config(config, tp)
    ref = model_ref(source, config)
    if expected is not None:
        check_same_model(expected, ref)
    tokenizer = load_tokenizer(source)
    lm = TensorParallelLM.simulated(load_dense(source, config, device, dtype), tp)
    return Session(lm, tokenizer, ref, config.max_position_embeddings)


def check_same_model(expected: ModelRef, found: ModelRef) -> None:
    """Raises InputError, naming what differs, unless both references are of the same weights and configuration."""
    for field, what in (
        ("architecture", "architecture"),
        ("num_blocks", "number of blocks"),
        ("config_hash", "configuration"),
        ("weight_fingerprint", "weights"),
    ):
        if getattr(expected, field) != getattr(found, field):
            raise InputError(
                f"{found.id} is not the model this file was made for ({expected.id}): the {what} differs; "
                "name the right one, or profile and plan anew."
            )


def versions() -> dict[str, str]:
    """Versions that stand in every file written."""
    from importlib.metadata import version

    return {
        "spd_calib": version("spd-calib"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
