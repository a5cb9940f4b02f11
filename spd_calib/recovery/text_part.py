"""Writing a recovered language model back into the model of text and images that it is part of.

File by file as the original is cut, each tensor under the name that it has there; what is not the language model's
stays as it is, to the byte.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from spd_calib.errors import InputError
from spd_calib.models.checkpoint import account
from spd_calib.models.load import Source
from spd_calib.models.quantised import QuantisedTensor
from spd_calib.models.schemes import scheme_of
from spd_calib.models.stacked import AnyTensor, StackedTensor
from spd_calib.models.stored import INDEX, safetensors_files
from spd_calib.models.text_part import whole_of


def is_part(config: Any) -> bool:
    """Tell whether a configuration is that of a part of a multimodal model."""
    return whole_of(config) is not config


def refuse_quantised_part(source: Source, config: Any) -> None:
    """Raise InputError for a quantised multimodal model: not all that is quantised in it can be dequantised here."""
    if is_part(config) and scheme_of(config) is not None:
        raise InputError(
            f"{source.id} is a quantised model of text and images, which recovery cannot write; recover the one it was "
            "made from, and quantise that."
        )


def write_part(folder: Path, part: PreTrainedModel, *, source: Source, dtype: torch.dtype) -> None:
    """Write the weight files of the multimodal model in `source` into `folder`, with the weights of `part` in `dtype`.

    `part` is the language model that was loaded from `source`, its weights changed, its shapes not.
    """
    stored = account(source, part)
    new = {
        name: tensor
        for of_model, weight in part.state_dict().items()
        for name, tensor in _as_stored(stored[of_model], weight.to("cpu", dtype))
    }
    for path in safetensors_files(source.folder):
        tensors = {name: new.get(name, tensor).contiguous() for name, tensor in load_file(path).items()}
        save_file(tensors, folder / path.name, metadata={"format": "pt"})
    if (index := source.folder / INDEX).is_file():
        shutil.copyfile(index, folder / INDEX)


def _as_stored(stored: AnyTensor, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield what a weight is on disk: itself, or expert by expert the pieces that it was stacked of."""
    assert not isinstance(stored, QuantisedTensor)  # refuse_quantised_part
    if not isinstance(stored, StackedTensor):
        yield stored.name, weight
        return
    for pieces, of_expert in zip(stored.pieces, weight, strict=True):
        for piece, rows in zip(pieces, of_expert.split([piece.shape[0] for piece in pieces]), strict=True):
            yield piece.name, rows
