"""Writing a recovered model under the names that its weights have on disk, one block after the other.

So is written what transformers could not write from memory: a language model that is part of a model of text and
images, whose other tensors stay as they are, to the byte, and a model that is read from disk block by block.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from spd_calib.errors import InputError
from spd_calib.models.checkpoint import account, same_bytes
from spd_calib.models.load import Source
from spd_calib.models.quantised import QuantisedTensor
from spd_calib.models.schemes import scheme_of
from spd_calib.models.stacked import AnyTensor, StackedTensor
from spd_calib.models.stored import INDEX, SINGLE, opened, stored_tensors
from spd_calib.models.text_part import whole_of

from .planned_model import PlannedModel

PIECE_BYTES = 4 * 2**30  # of a file, unless one tensor is larger


def is_part(config: Any) -> bool:
    """Tell whether a configuration is that of a part of a multimodal model."""
    return whole_of(config) is not config


def check_can_be_written(source: Source, config: Any, *, stream: bool) -> None:
    """Raise InputError for a quantised model that could be written under its own names alone: it is dequantised."""
    if scheme_of(config) is None:
        return
    if is_part(config):
        raise InputError(
            f"{source.id} is a quantised model of text and images, which recovery cannot write; recover the one it was "
            "made from, and quantise that."
        )
    if stream:
        raise InputError(
            f"{source.id} is quantised, and recovery cannot write such a model where it is read from disk block by "
            "block; recover the one it was made from, and quantise that."
        )


def write_as_stored(folder: Path, model: PlannedModel, *, source: Source, dtype: torch.dtype) -> None:
    """Write the weights of `model`, which was loaded from `source`, into `folder`, in `dtype`. Uses up `model`.

    Held at a time are one block and what one file holds.
    """
    held_by, total = list[list[str]](), 0  # the tensors' names, by file
    for tensors in _in_pieces(_as_stored(model, source, dtype)):
        save_file(tensors, folder / f"piece-{len(held_by)}", metadata={"format": "pt"})
        held_by.append(list(tensors))
        total += sum(tensor.nbytes for tensor in tensors.values())
    several = len(held_by) > 1
    files = [f"model-{i + 1:05}-of-{len(held_by):05}.safetensors" if several else SINGLE for i in range(len(held_by))]
    for i, file in enumerate(files):
        (folder / f"piece-{i}").rename(folder / file)
    if several:
        places = {name: file for file, names in zip(files, held_by, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _in_pieces(named: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors by name, as many at a time as a file holds."""
    piece, size = dict[str, Tensor](), 0
    for name, tensor in named:
        if piece and size + tensor.nbytes > PIECE_BYTES:
            yield piece
            piece, size = {}, 0
        piece[name], size = tensor.contiguous(), size + tensor.nbytes
    yield piece


def _as_stored(model: PlannedModel, source: Source, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of `model` in `dtype`, by their names in `source`; of a larger model, the rest as it is.

    A second copy of tied weights is left out, as transformers does.
    """
    given, weights = set[str](), model.weights()
    stored = account(source, model.lm.model)
    for of_model, weight in weights:
        for name, tensor in _pieces(stored[of_model], weight.to("cpu", dtype)):
            if name not in given:  # of tied weights the second is the first
                given.add(name)
                yield name, tensor
    if not is_part(model.lm.model.config):
        return
    names = Counter(tensor.name for tensor in stored.values())
    tied = [tensor for tensor in stored.values() if names[tensor.name] > 1]
    for name, other in stored_tensors(source.folder).items():
        if name not in given and not any(same_bytes(other, tensor) for tensor in tied):
            with opened({other.file}) as files:
                yield name, files[other.file].get_tensor(name)


def _pieces(stored: AnyTensor, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield what a weight is on disk: itself, or expert by expert the pieces that it was stacked of."""
    assert not isinstance(stored, QuantisedTensor)  # check_can_be_written
    if not isinstance(stored, StackedTensor):
        yield stored.name, weight
        return
    for pieces, of_expert in zip(stored.pieces, weight, strict=True):
        for piece, rows in zip(pieces, of_expert.split([piece.shape[0] for piece in pieces]), strict=True):
            yield piece.name, rows
