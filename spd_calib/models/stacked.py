"""Reading cuts of a model's tensors from the files of a checkpoint, experts stored one by one among them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .quantised import Piece, QuantisedTensor
from .stored import StoredTensor, opened

ALL = slice(None)


@dataclass(frozen=True)
class StackedTensor:
    """Tensors [rows, columns] of a checkpoint that together are one of a model, [experts, rows, columns].

    `pieces` holds those of each expert, one below the other: of its gate, say, and of its up projection.
    """

    pieces: tuple[tuple[Piece, ...], ...]

    @property
    def name(self) -> str:
        """Return the first piece's name."""
        return self.pieces[0][0].name

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the whole; one that no tensor has, where the pieces do not fit each other."""
        of_experts = {tuple(piece.shape for piece in pieces) for pieces in self.pieces}
        rest = {shape[1:] for shapes in of_experts for shape in shapes}
        if len(of_experts) != 1 or len(rest) != 1:
            return ()
        return (len(self.pieces), sum(shape[0] for shape in next(iter(of_experts))), *rest.pop())


AnyTensor = Piece | StackedTensor


def read_cuts(tensor: AnyTensor, *, rows: tuple[slice, ...], columns: slice) -> Tensor:
    """Return ranges of rows, one behind the other, and a range of columns of a tensor; of each expert, if stacked.

    The rows of a convolution by channel, [channels, 1, width], are its channels. A tensor of one number has neither. A
    quantised weight is dequantised, whole, and then cut. Raises InputError for a file that has gone.
    """
    if isinstance(tensor, StackedTensor):
        with opened({p.file for pieces in tensor.pieces for p in pieces if isinstance(p, StoredTensor)}) as files:
            return torch.stack([_of_expert(files, pieces, rows, columns) for pieces in tensor.pieces])
    if isinstance(tensor, QuantisedTensor):
        dequantised = tensor.read()
        return torch.cat([dequantised[..., r, columns] for r in rows], dim=-2)
    with opened({tensor.file}) as files:
        if not tensor.shape:
            return files[tensor.file].get_tensor(tensor.name)
        whole = files[tensor.file].get_slice(tensor.name)
        stacks = (ALL,) if len(tensor.shape) == 3 and tensor.shape[1] != 1 else ()
        cuts = [whole[(*stacks, r, columns)[: len(tensor.shape)]] for r in rows]
        return cuts[0] if len(cuts) == 1 else torch.cat(cuts, dim=len(stacks))


def _of_expert(files: Mapping[Path, Any], pieces: tuple[Piece, ...], rows: tuple[slice, ...], columns: slice) -> Tensor:
    """Return rows and columns of one expert's matrix, of which `pieces` lie below one another."""
    cuts, height = [], sum(piece.shape[0] for piece in pieces)
    for wanted in rows:
        first, last, _ = wanted.indices(height)
        above = 0
        for piece in pieces:
            own = slice(max(first - above, 0), min(last - above, piece.shape[0]))
            if own.start < own.stop:
                whole = piece.read() if isinstance(piece, QuantisedTensor) else files[piece.file].get_slice(piece.name)
                cuts.append(whole[own, columns])
            above += piece.shape[0]
    return torch.cat(cuts)
