"""Loading one rank's share of a model, straight from the safetensors files: no process ever holds the whole.

Cut are the linear layers of the blocks and an output head that is not tied to the embedding; the rest (embeddings,
norms, the biases that are added after a sum) is whole on every rank.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spd_calib.errors import InputError

from .architecture import HeadCounts
from .checkpoint import Checkpoint, refuse_not_finite
from .load import DTYPES, check_device, refusing_unreadable, skeleton
from .probe import find_layers
from .shard import ALL, ALL_ROWS, RankSlices, Rows, linear_slices, vocabulary_slice
from .source import Source

Own = dict[str, tuple[Rows, slice]]  # parameter -> the rows and columns that a rank owns; whole where not named


def load_sharded(source: Source, config: Any, *, rank: int, tp: int, device: str, dtype: str) -> PreTrainedModel:
    """Return the model of rank `rank` of `tp` in eval mode: its linear layers hold the rank's slices only.

    Raises InputError where the folder's tensors are not the model's, or a share does not fit on the device.
    """
    check_device(device)
    model = skeleton(source, config, dtype=dtype)
    own = own_slices(model, rank=rank, tp=tp)
    stored = Checkpoint(source, model)
    loaded: dict[Tensor, nn.Parameter] = {}  # tied parameters are one
    too_large = (
        f"A rank's share of {source.id} does not fit on {device} in {dtype}; use more ranks or a narrower dtype."
    )
    with refusing_unreadable(source, too_large):
        fill_buffers(model, stored, device=device)
        for name, parameter in list(model.named_parameters(remove_duplicate=False)):
            if parameter not in loaded:
                rows, columns = own.get(name, (ALL_ROWS, ALL))
                piece = stored.read(name, rows=rows, columns=columns, dtype=DTYPES[dtype])
                loaded[parameter] = nn.Parameter(piece.to(device))
            set_tensor(model, name, value=loaded[parameter])
    return model


def own_slices(model: PreTrainedModel, *, rank: int, tp: int) -> Own:
    """Return what a rank owns of each parameter that is cut, as (rows, columns) (docs/design.md, section 2)."""
    names = {module: name for name, module in model.named_modules()}
    own: Own = {}
    for parts in find_layers(model):
        for linear, rows, columns in linear_slices(parts, RankSlices.of(HeadCounts.of(parts), rank, tp)):
            own[f"{names[linear]}.weight"] = (rows, columns)
            own[f"{names[linear]}.bias"] = (rows, ALL)
    head = model.get_output_embeddings()
    if head.weight is not model.get_input_embeddings().weight:
        rows = (vocabulary_slice(head.out_features, rank=rank, tp=tp),)
        own[f"{names[head]}.weight"] = (rows, ALL)
        own[f"{names[head]}.bias"] = (rows, ALL)
    return own


def fill_buffers(model: PreTrainedModel, stored: Checkpoint, *, device: str) -> None:
    """Compute the buffers that no checkpoint holds (rotary frequencies) as transformers does; read the others.

    Comes before the parameters: those that transformers would draw along with a buffer are not there yet. Raises
    InputError for a buffer that cannot be computed.
    """
    computed = dict(model.named_non_persistent_buffers())
    for name, buffer in list(model.named_buffers()):
        value = torch.full(buffer.shape, torch.nan) if name in computed else stored.read(name)
        set_tensor(model, name, value=value.to(device, buffer.dtype))
    for name in computed:
        model._init_weights(model.get_submodule(name.rpartition(".")[0]))
        if not model.get_buffer(name).is_floating_point():
            raise InputError(f"{type(model).__name__} has a buffer {name} that this tool cannot compute on its ranks.")
        refuse_not_finite(name, model.get_buffer(name), model=stored.id)


def set_tensor(model: nn.Module, name: str, *, value: Tensor) -> None:
    """Put a parameter or buffer in the place of the one that `model` has under `name`."""
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, value)
