"""Models larger than memory: the weights of one block at a time, read from the safetensors files when it is to run."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spd_calib.errors import InputError

from .architecture import find_decoder
from .checkpoint import Checkpoint
from .fill import fill_buffers, set_tensor
from .load import DTYPES, check_device, refusing_unreadable, skeleton
from .source import Source


def must_stream(source: Source, config: Any, *, device: str, dtype: str) -> bool:
    """Tell whether the weights would take more than half of the memory free. Raises InputError without the device."""
    check_device(device)
    weights = sum(p.numel() for p in skeleton(source, config).parameters()) * DTYPES[dtype].itemsize
    return weights > _free_memory(device) / 2


def _free_memory(device: str) -> float:
    """Return the bytes of memory free on a device; infinity where that cannot be told."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024 * float(fields["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):  # not Linux
        return float("inf")


class BlockWeights:
    """The matrices of the blocks, of which one block's at a time are in memory.

    Norms and biases stay: where an MLP's sync point is dropped, the next block still needs them.
    """

    def __init__(self, stored: Checkpoint, blocks: list[list[tuple[str, nn.Parameter]]]):
        self.stored, self.blocks = stored, blocks
        self.held: int | None = None

    def hold(self, block: int) -> None:
        """Read the weights of `block`, and let go of those held before.

        Raises InputError for NaN or Inf in them, and where the files have changed or gone since they were opened.
        """
        if block == self.held:
            return
        self.stored.check_unchanged()
        if self.held is not None:
            for _, parameter in self.blocks[self.held]:
                parameter.data = no_memory(parameter.shape, parameter)
        self.held = None
        for name, parameter in self.blocks[block]:
            parameter.data = self.stored.read(name, dtype=parameter.dtype).to(parameter.device)
        self.held = block


def load_streamed(source: Source, config: Any, *, device: str, dtype: str) -> tuple[PreTrainedModel, BlockWeights]:
    """Return the model in eval mode, all but its blocks' weights read; those are there while BlockWeights holds them.

    Raises InputError where the folder's tensors are not the model's, or the embeddings do not fit.
    """
    check_device(device)
    model = skeleton(source, config, dtype=dtype)
    stored = Checkpoint(source, model)
    decoder = find_decoder(model)
    if decoder is None:
        raise InputError(f"{type(model).__name__} has no list of blocks that could be read one by one.")
    like = torch.empty(0, device=device, dtype=DTYPES[dtype])
    of_block = {id(p): i for i, layer in enumerate(decoder.layers) for p in layer.parameters()}
    blocks: list[list[tuple[str, nn.Parameter]]] = [[] for _ in decoder.layers]
    replaced: dict[int, nn.Parameter] = {}  # tied parameters are one
    with refusing_unreadable(source, f"The embeddings of {source.id} do not fit on {device} in {dtype}."):
        fill_buffers(model, stored, device=device)
        for name, parameter in list(model.named_parameters(remove_duplicate=False)):
            key = id(parameter)
            if key not in replaced:
                if key in of_block and parameter.dim() > 1:
                    new = nn.Parameter(no_memory(parameter.shape, like), requires_grad=False)
                    blocks[of_block[key]].append((name, new))
                else:
                    new = nn.Parameter(stored.read(name, dtype=like.dtype).to(device), requires_grad=False)
                replaced[key] = new
            set_tensor(model, name, value=replaced[key])
    return model, BlockWeights(stored, blocks)


def no_memory(shape: torch.Size, like: Tensor) -> Tensor:
    """Return a tensor of NaN of any shape that takes the memory of one number, of the dtype and device of `like`."""
    return torch.full((1,) * len(shape), torch.nan, dtype=like.dtype, device=like.device).expand(shape)
