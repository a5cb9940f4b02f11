"""Quantised checkpoints: which stored tensors together are one weight, and that weight as real numbers.

A weight is measured as what an engine's kernels take it for: dequantised, exactly, to float32. What an engine rounds
besides, the numbers that a layer reads, is not simulated; `Scheme.reads` says so, and every file repeats it.
How the weights of each scheme lie on disk is in layouts.py, what a configuration says of them in schemes.py.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from spd_calib.errors import InputError

from .source import Source
from .stored import StoredTensor, opened

ORIGINAL = "name the one it was made from, in float32, bfloat16 or float16"

Parts = Mapping[str, Tensor]
Reads = Literal["", "8-bit floats", "8-bit whole numbers"]
"""The numbers that the inputs of linear layers are rounded to, in words; empty where they are not."""


@dataclass(frozen=True)
class Layout:
    """Says how a weight lies in several tensors.

    `dtypes` are those of each part, by the part's suffix, as safetensors spells them. What stands before it, and before
    `separator`, is the name of a module with a `weight`, or of the weight itself.
    """

    dtypes: Mapping[str, tuple[str, ...]]
    optional: frozenset[str]
    shape: Callable[[Mapping[str, tuple[int, ...]]], tuple[int, ...]]  # of the weight [out, in], from its parts'
    dequantise: Callable[[Parts], Tensor]  # to float32 [out, in]; raises ValueError for parts that do not fit
    separator: str = "."
    weight: str = ".weight"


@dataclass(frozen=True)
class Scheme:
    """Holds what a configuration says of its quantised weights, in words, and how they lie on disk."""

    method: str
    weights: str
    reads: Reads  # what an engine rounds the inputs of its linear layers to, beside the weights
    layout: Layout
    left_alone: tuple[str, ...]  # the modules that are not quantised, as the configuration names them

    @property
    def words(self) -> str:
        """Return the sentence of the scheme that stands in files: what was measured, and what was not."""
        said = f"{self.method}: {self.weights}, dequantised exactly"
        if not self.reads:
            return said
        return f"{said}; measured without what an engine rounds besides: what linear layers read, to {self.reads}"

    def leaves_alone(self, module: str) -> bool:
        """Tell whether the configuration says that a module's weight is not quantised."""
        dotted = f".{module}."
        return any(
            re.match(entry.removeprefix("re:"), module)
            if entry.startswith("re:")
            else f".{entry.strip('.')}." in dotted
            for entry in self.left_alone
        )


@dataclass(frozen=True)
class QuantisedTensor:
    """One weight of a checkpoint that several stored tensors make up, by their suffix."""

    name: str
    shape: tuple[int, ...]
    parts: Mapping[str, StoredTensor]
    scheme: Scheme

    def read(self) -> Tensor:
        """Return the whole weight in float32. Raises InputError where its parts hold what the scheme does not allow."""
        with opened({part.file for part in self.parts.values()}) as files:
            tensors = {suffix: files[part.file].get_tensor(part.name) for suffix, part in self.parts.items()}
        try:
            return self.scheme.layout.dequantise(tensors)
        except ValueError as e:
            raise InputError(f"{self.name} cannot be dequantised: {e}; {ORIGINAL}.") from None


Piece = StoredTensor | QuantisedTensor
"""A tensor of a checkpoint, in one stored tensor or in the several of a quantised weight."""


def gathered(source: Source, stored: Mapping[str, StoredTensor], scheme: Scheme) -> dict[str, Piece]:
    """Return the tensors of a quantised checkpoint with each weight's parts as one tensor, under the weight's name.

    Raises InputError for a weight that lacks a part, or has one in a form that the scheme does not have.
    """
    layout = scheme.layout
    own = frozenset(layout.dtypes) - {"weight"}
    split = [name.rpartition(layout.separator) for name in stored]
    modules = dict.fromkeys(module for module, _, suffix in split if suffix in own)
    found: dict[str, Piece] = dict(stored)
    for module in modules:
        parts = {suffix: found.pop(f"{module}{layout.separator}{suffix}", None) for suffix in layout.dtypes}
        held = {suffix: part for suffix, part in parts.items() if isinstance(part, StoredTensor)}
        if lost := sorted(layout.dtypes.keys() - held.keys() - layout.optional):
            raise InputError(
                f"{source.id} lacks {module}{layout.separator}{lost[0]}, without which that weight means nothing; "
                "fetch the model again."
            )
        if odd := [part for suffix, part in held.items() if part.dtype not in layout.dtypes[suffix]]:
            raise InputError(
                f"{source.id} holds {odd[0].name} as {odd[0].dtype}, which its configuration ({scheme.method}) does "
                f"not speak of; {ORIGINAL}."
            )
        try:
            shape = layout.shape({suffix: part.shape for suffix, part in held.items()})
        except (ValueError, IndexError):
            shapes = ", ".join(f"{suffix} {part.shape}" for suffix, part in held.items())
            raise InputError(
                f"{source.id}: the parts of {module} do not fit each other ({shapes}); the folder mixes two models."
            ) from None
        name = f"{module}{layout.weight}"
        if name in found:
            raise InputError(f"{source.id} holds {name} beside its quantised parts; fetch the model again.")
        found[name] = QuantisedTensor(name, shape, held, scheme)
    return found
