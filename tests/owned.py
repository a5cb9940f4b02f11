"""What a rank owns of a weight, cut out of the whole by hand."""

import torch
from torch import Tensor


def owned(whole: Tensor, rows: tuple[slice, ...] = (slice(None),), columns: slice = slice(None)) -> Tensor:
    """The rows of `whole`, range behind range, and of these the columns; a vector and a single number have none.

    Of stacked matrices those of each; of a convolution by channel, [channels, 1, width], its channels.
    """
    if whole.dim() == 0:
        return whole
    if whole.dim() == 3 and whole.shape[1] > 1:
        return torch.stack([owned(matrix, rows, columns) for matrix in whole])
    piece = torch.cat([whole[r] for r in rows])
    return piece[:, columns] if whole.dim() == 2 else piece
