"""Gathering what a model predicts for each token, while the vocabulary is gone through part by part.

No more than one part's logits are ever held. A plan's are compared with the dense model's as they pass: with z the
plan's logits, l the dense model's and p its probabilities,

    KL(dense || planned) = log sum exp z - log sum exp l - sum p (z - l)

exactly. The sums of exponentials are kept relative to the largest logit so far, as in any online softmax, and added up
in float64.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from spd_calib.parallel.comm import Comm

FIELDS = ("nll_dense", "nll", "kl", "correct_dense", "correct", "agree")


@dataclass
class Predictions:
    """Holds what the logits of N tokens have shown so far; every field is [N] float64."""

    largest: Tensor  # logit
    token: Tensor  # the first that has it
    total: Tensor  # sum of exp(logit - largest)
    of_target: Tensor  # the logit of the token that follows
    change: Tensor  # sum of (logit - the dense model's), weighed by the exponentials of the dense model's total
    least_change: Tensor
    most_change: Tensor

    @classmethod
    def none_yet(cls, targets: Tensor) -> "Predictions":
        """Return what is known before the first part, of the tokens followed by `targets` [N]."""
        start = dict.fromkeys(("token", "total", "change"), 0.0) | {"least_change": torch.inf}
        at = [start.get(f.name, -torch.inf) for f in fields(cls)]
        return cls(*(torch.full(targets.shape, x, dtype=torch.float64, device=targets.device) for x in at))

    def compare(self, logits: Tensor, dense: Tensor, weights: Tensor) -> None:
        """Take in how some logits differ from the dense model's; all are [N, part] float32.

        weights: exp(dense - the dense model's largest logit).
        """
        change = logits - dense
        self.change += torch.linalg.vecdot(weights, change)
        self.least_change = torch.minimum(self.least_change, change.amin(-1).double())
        self.most_change = torch.maximum(self.most_change, change.amax(-1).double())

    def add(self, logits: Tensor, first: int, targets: Tensor) -> None:
        """Take in the logits [N, part] float32, which are overwritten, of the tokens from id `first` on."""
        place = targets - first
        inside = (place >= 0) & (place < logits.shape[-1])
        found = logits.gather(-1, place.clamp(0, logits.shape[-1] - 1)[:, None])[:, 0]
        self.of_target = torch.where(inside, found.double(), self.of_target)
        largest = torch.maximum(self.largest, logits.amax(-1).double())
        risen = (largest > self.largest).nonzero()[:, 0]  # few, but for the first part
        self.token[risen] = (logits[risen].argmax(-1) + first).double()
        self.total *= (self.largest - largest).exp()
        self.total += logits.sub_(largest.float()[:, None]).exp_().sum(-1)
        self.largest = largest

    def joined(self, comm: Comm) -> "Predictions":
        """Return what all processes' logits have shown; each has gone through its own ranks' part of the vocabulary."""
        state = torch.stack([getattr(self, f.name) for f in fields(self)], dim=-1)  # [N, fields]
        each = comm.all_gather([state]).unflatten(-1, (-1, state.shape[-1]))  # [N, processes, fields]
        if each.shape[1] == 1:
            return self
        one = {f.name: values for f, values in zip(fields(self), each.unbind(-1), strict=True)}
        largest, where = one["largest"].max(-1)  # of equal ones the first, whose tokens come first
        return Predictions(
            largest=largest,
            token=one["token"].gather(-1, where[:, None])[:, 0],
            total=(one["total"] * (one["largest"] - largest[:, None]).exp()).sum(-1),
            of_target=one["of_target"].amax(-1),
            change=one["change"].sum(-1),
            least_change=one["least_change"].amin(-1),
            most_change=one["most_change"].amax(-1),
        )

    @property
    def log_sum(self) -> Tensor:
        """Return log sum exp of the logits, [N] float64."""
        return self.largest + self.total.log()


def token_metrics(dense: Predictions, planned: Predictions, targets: Tensor) -> tuple[Tensor, float]:
    """Return FIELDS of every token, [N, 6] float64, and the largest |delta log p|, once the vocabulary is through."""
    shift = planned.log_sum - dense.log_sum
    columns = (
        dense.log_sum - dense.of_target,
        planned.log_sum - planned.of_target,
        shift - planned.change / dense.total,
        dense.token == targets,
        planned.token == targets,
        dense.token == planned.token,
    )
    largest = torch.maximum(planned.most_change - shift, shift - planned.least_change).max().item()
    return torch.stack([c.double() for c in columns], dim=-1), largest
