"""The standard error of a mean over text, taken over sequences."""

import numpy as np
import torch
from torch import Tensor


def ratio_and_stderr(sums: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the mean of a quantity per token, and its standard error over sequences; None where there is only one.

    sums [sequences, ...]: the quantity, summed over each sequence's tokens; tokens [sequences]: how many these are.
    Both are float64 on the CPU, and what is returned has the remaining shape of `sums`.

    With sums s_j over n_j tokens the mean is the ratio R = sum s_j / sum n_j. Its error over m sequences is, by the
    delta method, sqrt(m / (m - 1) * sum (s_j - R n_j)^2) / sum n_j: with equal lengths, the standard error of the
    sequences' means.
    """
    m, total = len(tokens), tokens.sum()
    mean = sums.sum(0) / total
    if m < 2:
        return mean, None
    n = tokens.view(-1, *[1] * (sums.dim() - 1))
    squares = (sums - mean * n).pow(2).sum(0)
    root = np.sqrt((m / (m - 1) * squares).numpy())  # correctly rounded on every machine, which torch's is not
    return mean, torch.as_tensor(root) / total
