"""Predictions from whole logits, taken in tile by tile."""

from torch import Tensor

from spd_calib.sensitivity.predictions import Predictions, token_metrics


def metrics_of_logits(dense: Tensor, planned: Tensor, targets: Tensor, *, part: int = 5) -> tuple[Tensor, float]:
    """token_metrics of logits [N, V] and targets [N], the vocabulary gone through `part` tokens at a time."""
    p, q = Predictions.none_yet(targets), Predictions.none_yet(targets)
    for first in range(0, dense.shape[-1], part):
        p.add(dense[:, first : first + part].float().clone(), first, targets)
    for first in range(0, dense.shape[-1], part):
        of_dense, own = (z[:, first : first + part].float() for z in (dense, planned))
        q.compare(own, of_dense, (of_dense - p.largest.float()[:, None]).exp())
        q.add(own.clone(), first, targets)
    return token_metrics(p, q, targets)
