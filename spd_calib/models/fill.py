"""Filling a model on the meta device: buffers computed as transformers does, parameters read from the checkpoint."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spd_calib.errors import InputError

from .checkpoint import Checkpoint, refuse_not_finite
from .shard import ALL, ALL_ROWS, Rows

Own = dict[str, tuple[Rows, slice]]  # parameter -> the rows and columns that a rank owns; whole where not named


def fill(
    model: PreTrainedModel,
    stored: Checkpoint,
    *,
    own: Mapping[str, tuple[Rows, slice]],
    device: str,
    dtype: torch.dtype,
) -> None:
    """Give `model` its buffers, and of each parameter what `own` says, in `dtype` on `device`.

    Raises InputError as `fill_buffers` and `Checkpoint.read` do.
    """
    loaded: dict[Tensor, nn.Parameter] = {}  # tied parameters are one
    fill_buffers(model, stored, device=device)
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if parameter not in loaded:
            rows, columns = own.get(name, (ALL_ROWS, ALL))
            loaded[parameter] = nn.Parameter(stored.read(name, rows=rows, columns=columns, dtype=dtype).to(device))
        set_tensor(model, name, value=loaded[parameter])


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
