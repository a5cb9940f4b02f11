"""Accounting for a model's tensors: all that its configuration asks for, and where each of them lies on disk.

The one definition for every way to load a model (whole, block by block, a rank's slices) and for a runtime's
fingerprint. A folder is refused, before any weight is read, where a tensor is missing, where one is left over that
might change what the others mean, and where one is not of the shape or the kind of number that the model has there.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from spd_calib.errors import InputError

from .causes import foreign_number, left_over, missing
from .quantised import Piece, QuantisedTensor, Scheme, gathered
from .schemes import scheme_of
from .source import Source
from .stacked import AnyTensor, StackedTensor, read_cuts
from .stored import StoredTensor, safetensors_files, stored_tensors
from .text_part import names_in_whole, whole_of, whole_skeleton

ALL = slice(None)
NUMBERS = ("F32", "BF16", "F16", "F64")
"""The kinds of number that a weight is read from, as safetensors spells them; any other is a quantised weight's."""
EXPERT = re.compile(r"\.experts\.(\d+)\.")
ROTARY = re.compile(r"(^|\.)rotary_emb\.inv_freq$")  # old checkpoints hold it for each block; it is computed
COMPARED_BYTES = 2**26  # of each of two tied tensors at a time


def account(source: Source, model: PreTrainedModel) -> dict[str, AnyTensor]:
    """Return the stored tensor of each parameter and persistent buffer of `model`, by its name in the model.

    Of a multimodal model's text part; the whole is accounted for. Raises InputError as `_account` does, and where the
    whole does not hold the part.
    """
    config = whole_of(model.config)
    if config is model.config:
        return _account(source, model)
    whole = whole_skeleton(source, config)
    names = names_in_whole(model, whole)
    found = _account(source, whole)
    return {name: found[other] for name, other in names.items()}


def _account(source: Source, model: PreTrainedModel) -> dict[str, AnyTensor]:
    """Return the stored tensor of each parameter and persistent buffer of `model`, by its name in the model.

    `model` may be on the meta device. Names that are tied (an output head and its embedding) get the same tensor.
    Stored names may be spelled as transformers allows: with or without the prefix of the base model, or in the older
    spellings it knows of the class; what a quantised weight is made of is one tensor, and so are experts that are
    stored one by one where the model has them stacked. Raises InputError, one sentence with the likely cause, unless
    the folder holds exactly what `model` needs.
    """
    scheme = scheme_of(model.config)
    on_disk = stored_tensors(source.folder)
    stored: dict[str, Piece] = {**on_disk} if scheme is None else gathered(source, on_disk, scheme)
    wanted: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
    whole = [t for t in stored.values() if isinstance(t, StoredTensor)]
    if odd := [t for t in whole if t.dtype not in NUMBERS and not _harmless(t.name, model)]:
        raise InputError(foreign_number(source.id, odd, scheme=scheme.method if scheme else None))
    naming = _Naming(source, model, wanted=wanted)
    found: dict[str, AnyTensor] = {}
    unread: list[Piece] = []
    pieces: dict[str, dict[tuple[int, int], Piece]] = {}  # of experts, by expert and place
    for tensor in stored.values():
        name, place = naming.of(tensor.name)
        if name in wanted and place is not None:
            if place in pieces.setdefault(name, {}):
                raise InputError(f"The weights of {source.id} hold {tensor.name} twice; fetch the model again.")
            pieces[name][place] = tensor
        elif name not in wanted:
            unread += [] if _harmless(tensor.name, model) else [tensor]
        elif name in found:
            raise InputError(
                f"The weights of {source.id} hold {name} twice, as {found[name].name} and as {tensor.name}; "
                "fetch the model again."
            )
        else:
            found[name] = tensor
    for name, of_experts in pieces.items():
        if name in found:
            raise InputError(
                f"The weights of {source.id} hold {name} twice, stacked and expert by expert; fetch the model again."
            )
        found[name] = _stacked(source, of_experts, name=name, wanted=wanted[name])
    tied = _tied(wanted)
    if lost := [names[0] for names in tied if not any(n in found for n in names)]:
        raise InputError(missing(source.id, lost, wanted=wanted, unread=unread, rename=lambda n: naming.of(n)[0]))
    if unread:
        raise InputError(left_over(source.id, unread, wanted=wanted))
    for name, of_model in found.items():
        _check_shape(source, of_model, wanted=wanted[name])
    if scheme is not None:
        _check_left_alone(source, model, scheme=scheme, found=found)
    return _share(source, tied, found=found)


class _Naming:
    """Turns a stored name into the model's, by the rules that transformers has for the model's class."""

    def __init__(self, source: Source, model: PreTrainedModel, *, wanted: Mapping[str, Tensor]):
        transforms = get_model_conversion_mapping(model)
        self.renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self.converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self.source, self.prefix, self.known = source, model.base_model_prefix, dict(wanted)

    def of(self, stored: str) -> tuple[str, tuple[int, int] | None]:
        """Return the name in the model and, for one expert's piece of a stacked parameter, (expert, place below it).

        Raises InputError for a tensor that has to be converted in any other way.
        """
        name, pattern = rename_source_key(stored, self.renamings, self.converters, self.prefix, self.known)
        if name not in self.known and stored in self.known:  # transformers then takes the name as it is
            return rename_source_key(stored, [], [], self.prefix, self.known)[0], None
        if pattern is None:
            return name, None
        converter = next(c for c in self.converters if pattern in c.source_patterns)
        expert = EXPERT.search(stored)
        if expert is None or not _stacks(converter):
            raise InputError(
                f"{self.source.id} holds {stored} in a form that has to be converted into the model's weights, which "
                "is not supported; name a checkpoint whose tensors are those of the model."
            )
        return name, (int(expert[1]), converter.source_patterns.index(pattern))


def _stacks(converter: WeightConverter) -> bool:
    """Tell whether a conversion stacks matrices of experts, the pieces of each below one another, and does no more."""
    stack, *rest = converter.operations
    below = all(isinstance(op, Concatenate) and op.dim == 1 for op in rest) and len(rest) <= 1
    several = len(converter.source_patterns) > 1
    return isinstance(stack, MergeModulelist) and stack.dim == 0 and below and bool(rest) == several


def _stacked(source: Source, pieces: Mapping[tuple[int, int], Piece], *, name: str, wanted: Tensor) -> StackedTensor:
    """Return the pieces of a stacked parameter, by (expert, place), in order. Raises InputError where one is lost."""
    places = 1 + max(place for _, place in pieces)
    for expert in range(max(len(wanted), 1 + max(expert for expert, _ in pieces))):
        for place in range(places):
            if (expert, place) not in pieces:
                raise InputError(
                    f"The weights of {source.id} lack a part of expert {expert} for {name}, which its configuration "
                    "asks for; fetch the model again."
                )
    return StackedTensor(tuple(tuple(pieces[e, p] for p in range(places)) for e in range(len(pieces) // places)))


def _harmless(name: str, model: PreTrainedModel) -> bool:
    """Tell whether a tensor may be left unread: a rotary frequency, which every loader computes by itself."""
    return bool(ROTARY.search(name)) and any(n.endswith("rotary_emb.inv_freq") for n, _ in model.named_buffers())


def _tied(wanted: Mapping[str, Tensor]) -> list[list[str]]:
    """Return the names of `wanted`, those of one and the same parameter together."""
    groups: dict[int, list[str]] = {}
    for name, tensor in wanted.items():
        groups.setdefault(id(tensor), []).append(name)
    return list(groups.values())


def _check_left_alone(
    source: Source, model: PreTrainedModel, *, scheme: Scheme, found: Mapping[str, AnyTensor]
) -> None:
    """Raise InputError unless exactly those linear layers are quantised that the configuration says are."""
    for module, linear in model.named_modules():
        tensor = found.get(f"{module}.weight")
        if not isinstance(linear, nn.Linear) or tensor is None:
            continue
        stored_as = tensor.name.removesuffix(".weight")
        alone = scheme.leaves_alone(module) or scheme.leaves_alone(stored_as)
        if alone == isinstance(tensor, QuantisedTensor):
            raise InputError(
                f"{source.id} holds {stored_as} {'quantised' if alone else 'as it was'}, and its configuration "
                f"({scheme.method}) says that it is {'not' if alone else 'quantised'}; fetch the model again."
            )


def _check_shape(source: Source, tensor: AnyTensor, *, wanted: Tensor) -> None:
    """Raise InputError unless a stored tensor has the shape that the model has for it."""
    if tensor.shape != tuple(wanted.shape):
        raise InputError(
            f"{source.id}: {tensor.name} has the shape {tensor.shape} where its configuration says "
            f"{tuple(wanted.shape)}; the folder mixes two models."
        )


def _share(source: Source, tied: list[list[str]], *, found: Mapping[str, AnyTensor]) -> dict[str, AnyTensor]:
    """Return `found` with one stored tensor for all names of a parameter. Raises InputError where two differ."""
    shared: dict[str, AnyTensor] = {}
    for names in tied:
        first, *copies = [found[n] for n in names if n in found]
        for copy in copies:
            if not same_bytes(first, copy):
                raise InputError(
                    f"The weights of {source.id} hold {copy.name} and {first.name} with different values, but its "
                    "configuration ties them (tie_word_embeddings); set that to false if the two were trained apart, "
                    "or fetch the model again."
                )
        shared |= dict.fromkeys(names, first)
    return shared


def same_bytes(a: AnyTensor, b: AnyTensor) -> bool:
    """Tell whether two stored tensors are the same numbers in the same form; reads both, a piece at a time."""
    if not isinstance(a, StoredTensor) or not isinstance(b, StoredTensor) or (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    rows = max(1, COMPARED_BYTES // max(1, 8 * torch.Size(a.shape[1:]).numel()))
    with safe_open(a.file, framework="pt") as f, safe_open(b.file, framework="pt") as g:
        first, second = f.get_slice(a.name), g.get_slice(b.name)
        pieces = range(0, a.shape[0], rows) if a.shape else ()
        return all(torch.equal(_bits(first[i : i + rows]), _bits(second[i : i + rows])) for i in pieces)


def _bits(piece: Tensor) -> Tensor:
    """Return the bytes of a tensor, so that NaN equals itself and 0 does not equal -0."""
    return piece.contiguous().view(torch.uint8)


class Checkpoint:
    """The weights of a model, read piece by piece from where `account` has found them."""

    def __init__(self, source: Source, model: PreTrainedModel):
        self.id, self.tensors = source.id, account(source, model)
        self.checked: set[str] = set()
        self.files = {file: _state_of(file) for file in safetensors_files(source.folder)}

    def check_unchanged(self) -> None:
        """Raise InputError where a file is another than it was: pieces of two models must not be mixed."""
        for file, state in self.files.items():
            if _state_of(file) != state:
                raise InputError(f"{file} has changed since {self.id} was opened; run this again.")

    def read(
        self, name: str, *, rows: tuple[slice, ...] = (ALL,), columns: slice = ALL, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Return a piece of the parameter `name` in memory of its own, in `dtype` (default: as stored).

        A quantised weight is dequantised, whole, and then cut.

        `rows` are one range of its rows, or several, which are put one behind the other; of stacked experts, of the
        rows of each. Raises InputError for NaN or Inf in what is read for the first time, and for a file that has gone.
        """
        stored = self.tensors[name]
        if rows != (ALL,) and all(r.start == r.stop for r in rows):
            return torch.empty(0, *stored.shape[1:], dtype=dtype)
        piece = read_cuts(stored, rows=rows, columns=columns)
        piece = piece.to(dtype or piece.dtype)
        if name not in self.checked:
            check_weight(name, piece, model=self.id)
            self.checked.add(name)
        return piece.clone(memory_format=torch.contiguous_format)


def _state_of(file: Path) -> tuple[int, int, int] | None:
    """Return what a file that was written anew has another of; None where it has gone."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


@torch.no_grad()
def check_weight(name: str, weight: Tensor, *, model: str) -> None:
    """Raise InputError, naming the block, where a weight holds NaN or Inf: attention may turn them into a plain 0."""
    if weight.sum().isfinite() or weight.isfinite().all():  # of finite numbers, too, the sum may overflow
        return
    block = re.search(r"\.(\d+)\.", name)
    where = f"block {block[1]}, {name}" if block else name
    raise InputError(f"The weights of {model} hold NaN or Inf, first in {where}; fetch the model again.")


def refuse_not_finite(name: str, buffer: Tensor, *, model: str) -> None:
    """Raise InputError where a buffer, which is computed from the configuration, holds NaN or Inf."""
    if not buffer.isfinite().all():
        raise InputError(
            f"The configuration of {model} gives no finite numbers for {name}; correct its config.json (rope_theta or "
            "another of its rotary parameters), or fetch the model again."
        )
