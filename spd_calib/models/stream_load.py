"""Models larger than memory: the weights of one block at a time, read from the safetensors files when it is to run."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spd_calib.errors import InputError

from .architecture import find_decoder
from .load import DTYPES, Source, check_device
from .shard_load import Checkpoint, fill_buffers, set_tensor, skeleton


def must_stream(source: Source, config: Any, device: str, dtype: str) -> bool:
    """Would the weights take more than half of the memory free on the device? InputError where there is no device."""
    check_device(device)
    weights = sum(p.numel() for p in skeleton(source, config, dtype).parameters()) * DTYPES[dtype].itemsize
    return weights > _free_memory(device) / 2


def _free_memory(device: str) -> float:
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024 * float(fields["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):  # not Linux
        return float("inf")


class BlockWeights:
    """The parameters of the blocks, of which one block's at a time are in memory."""

    def __init__(self, stored: Checkpoint, blocks: list[list[tuple[str, nn.Parameter]]]):
        self.stored, self.blocks = stored, blocks
        self.held: int | None = None

    def hold(self, block: int) -> None:
        """Read the weights of `block`, and let go of those held before. Raises InputError for a weight not there."""
        if block == self.held:
            return
        if self.held is not None:
            for _, parameter in self.blocks[self.held]:
                parameter.data = no_memory(parameter.shape, parameter)
        self.held = None
        for name, parameter in self.blocks[block]:
            parameter.data = self.stored.read([name], parameter.shape).to(parameter)
        self.held = block


def load_streamed(source: Source, config: Any, device: str, dtype: str) -> tuple[PreTrainedModel, BlockWeights]:
    """The model in eval mode, all but its blocks' weights read; those are there while BlockWeights holds them.

    Raises InputError where a weight is missing, of another shape than the configuration says, or does not fit.
    """
    check_device(device)
    model = skeleton(source, config, dtype)
    stored = Checkpoint(source, model.base_model_prefix)
    decoder = find_decoder(model)
    assert decoder is not None, "check_config has found its layers"
    like = torch.empty(0, device=device, dtype=DTYPES[dtype])
    names = {id(p): name for name, p in model.named_parameters()}
    of_block = {id(p): i for i, layer in enumerate(decoder.layers) for p in layer.parameters()}
    blocks: list[list[tuple[str, nn.Parameter]]] = [[] for _ in decoder.layers]
    replaced: dict[int, nn.Parameter] = {}  # tied parameters are one
    parameters = list(model.named_parameters(remove_duplicate=False))
    try:
        fill_buffers(model, stored, device)
        for name, parameter in parameters:
            key = id(parameter)
            if key not in replaced:
                if key in of_block:
                    new = nn.Parameter(no_memory(parameter.shape, like), requires_grad=False)
                    blocks[of_block[key]].append((names[key], new))
                else:
                    aliases = [n for n, p in parameters if p is parameter]
                    new = nn.Parameter(stored.read(aliases, parameter.shape).to(like), requires_grad=False)
                replaced[key] = new
            set_tensor(model, name, replaced[key])
    except torch.OutOfMemoryError:
        raise InputError(f"The embeddings of {source.id} do not fit on {device} in {dtype}.") from None
    return model, BlockWeights(stored, blocks)


def no_memory(shape: torch.Size, like: Tensor) -> Tensor:
    """A tensor of any shape that takes the memory of one number."""
    return torch.full((1,) * len(shape), torch.nan, dtype=like.dtype, device=like.device).expand(shape)
