"""Loading one rank's share of a model, straight from the safetensors files: no process ever holds the whole.

Cut are the linear layers of the blocks and an output head that is not tied to the embedding; the rest (embeddings,
norms, the biases that are added after a sum) is whole on every rank.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from spd_calib.errors import InputError

from .architecture import HeadCounts
from .fingerprint import safetensors_files
from .load import DTYPES, Source, check_device, check_weight
from .probe import find_layers
from .shard import ALL, RankSlices, linear_slices, vocabulary_slice

Own = dict[str, tuple[slice, slice]]  # parameter -> the rows and columns that a rank owns; whole where not named


def load_sharded(source: Source, config: Any, rank: int, tp: int, device: str, dtype: str) -> PreTrainedModel:
    """The model of rank `rank` of `tp` in eval mode: its linear layers hold the rank's slices only.

    Raises InputError where a weight is missing, of another shape than the configuration says, or does not fit on
    the device.
    """
    check_device(device)
    model = skeleton(source, config, dtype)
    own = own_slices(model, rank, tp)
    stored = Checkpoint(source, model.base_model_prefix)
    loaded: dict[Tensor, nn.Parameter] = {}  # tied parameters are one
    try:
        fill_buffers(model, stored, device)
        for name, parameter in list(model.named_parameters(remove_duplicate=False)):
            if parameter not in loaded:
                aliases = [n for n, p in model.named_parameters(remove_duplicate=False) if p is parameter]
                piece = stored.read(aliases, parameter.shape, *own.get(name, (ALL, ALL)))
                loaded[parameter] = nn.Parameter(piece.to(device, DTYPES[dtype]))
            set_tensor(model, name, loaded[parameter])
    except torch.OutOfMemoryError:
        raise InputError(
            f"A rank's share of {source.id} does not fit on {device} in {dtype}; use more ranks or --dtype bfloat16."
        ) from None
    return model


def skeleton(source: Source, config: Any, dtype: str) -> PreTrainedModel:
    """The model in eval mode on the meta device: everything but its weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype], trust_remote_code=False).eval()
    if (source.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source.folder)
    return model


def own_slices(model: PreTrainedModel, rank: int, tp: int) -> Own:
    """What a rank owns of each parameter that is cut (DESIGN section 2, "Heads", and the vocabulary-parallel head)."""
    names = {module: name for name, module in model.named_modules()}
    own: Own = {}
    for parts in find_layers(model):
        for linear, rows, columns in linear_slices(parts, RankSlices.of(HeadCounts.of(parts), rank, tp)):
            own[f"{names[linear]}.weight"] = (rows, columns)
            own[f"{names[linear]}.bias"] = (rows, ALL)
    head = model.get_output_embeddings()
    if head.weight is not model.get_input_embeddings().weight:
        rows = vocabulary_slice(head.out_features, rank, tp)
        own[f"{names[head]}.weight"] = (rows, ALL)
        own[f"{names[head]}.bias"] = (rows, ALL)
    return own


class Checkpoint:
    """The tensors of a checkpoint's files, read piece by piece."""

    def __init__(self, source: Source, prefix: str):
        self.id, self.prefix = source.id, f"{prefix}."
        self.files: dict[str, Path] = {}
        self.checked: set[str] = set()
        for path in safetensors_files(source.folder):
            try:
                with safe_open(path, framework="pt") as f:
                    self.files.update(dict.fromkeys(f.keys(), path))
            except (SafetensorError, OSError):
                raise InputError(f"{path} is not a whole safetensors file; fetch the model again.") from None

    def read(self, names: list[str], shape: torch.Size, rows: slice = ALL, columns: slice = ALL) -> Tensor:
        """A piece of the parameter of these (tied) names, in a memory of its own; `shape` is that of the whole.

        Raises InputError for NaN or Inf in what is read for the first time.
        """
        name = self._stored_name(names)
        # opened anew each time: what was read of a file that stays open counts as this process's memory
        with safe_open(self.files[name], framework="pt") as f:
            whole = f.get_slice(name)
            if tuple(whole.get_shape()) != tuple(shape):
                raise InputError(
                    f"{self.id}: {name} has the shape {tuple(whole.get_shape())} where its configuration says "
                    f"{tuple(shape)}; the folder mixes two models."
                )
            if rows != ALL and rows.start == rows.stop:
                return torch.empty(0, *shape[1:])
            piece = whole[rows] if len(shape) == 1 else whole[rows, columns]
            if name not in self.checked:
                check_weight(self.id, name, piece)
                self.checked.add(name)
            return piece.clone(memory_format=torch.contiguous_format)

    def _stored_name(self, names: list[str]) -> str:
        """A checkpoint of the bare decoder lacks the prefix of the model with its head, and one may have it twice."""
        for name in names:
            for spelling in (name, name.removeprefix(self.prefix), self.prefix + name):
                if spelling in self.files:
                    return spelling
        raise InputError(f"The weights of {self.id} lack {names[0]}; fetch the model again, or convert it.")


def fill_buffers(model: PreTrainedModel, stored: Checkpoint, device: str) -> None:
    """Buffers that no checkpoint holds (rotary frequencies) are computed as transformers does; the others are read.

    Comes before the parameters: those that transformers would draw along with a buffer are not there yet.
    """
    computed = dict(model.named_non_persistent_buffers())
    for name, buffer in list(model.named_buffers()):
        unknown = torch.full(buffer.shape, torch.nan)
        value = unknown if name in computed else stored.read([name], buffer.shape)
        set_tensor(model, name, value.to(device, buffer.dtype))
    for name in computed:
        model._init_weights(model.get_submodule(name.rpartition(".")[0]))
        if not model.get_buffer(name).is_floating_point() or model.get_buffer(name).isnan().any():
            raise InputError(f"{type(model).__name__} has a buffer {name} that this tool cannot compute on its ranks.")


def set_tensor(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, value)
