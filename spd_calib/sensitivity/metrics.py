"""The metrics of a plan against the dense model, over all tokens (docs/design.md, section 3).

Sums are kept per sequence: a mean is over all predicted tokens, its standard error over sequences, since the
tokens of one are not independent.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spd_calib.errors import InputError
from spd_calib.formats.profile import Baseline, Comparison

from .predictions import FIELDS
from .standard_error import ratio_and_stderr

MAX_NLL = 709  # nats: exp of it is still a float


def perplexity(nll: float) -> float:
    """Return exp(nll), of nats a token. Raises InputError where that is beyond any number."""
    if nll > MAX_NLL:
        raise InputError(
            f"The model's loss is {nll:.0f} nats a token, and of more than {MAX_NLL} there is no perplexity: its "
            "weights or the tokenizer are not those it was trained with; name the right ones."
        )
    return math.exp(nll)


@dataclass
class Tally:
    """Sums of FIELDS and token counts, one row a sequence."""

    sums: list[Tensor] = field(default_factory=list)  # [6] float64 each
    tokens: list[int] = field(default_factory=list)
    max_abs_logprob_diff: float = 0.0
    routed: list[float] = field(default_factory=list)  # tokens routed as dense; empty without mixtures of experts

    def add(self, other: "Tally") -> None:
        """Add the sequences of `other`, behind those that stand here."""
        self.sums += other.sums
        self.tokens += other.tokens
        self.routed += other.routed
        self.max_abs_logprob_diff = max(self.max_abs_logprob_diff, other.max_abs_logprob_diff)

    def state(self) -> dict:
        """Return the tally as JSON values, from which `of_state` makes it again, to the bit.

        Raises InputError where a perplexity overflows.
        """
        if self.sums and self.finite():
            for name in ("nll_dense", "nll"):
                perplexity(self._mean(name)[0])
        return {
            "sums": [row.tolist() for row in self.sums],
            "tokens": self.tokens,
            "max_abs_logprob_diff": self.max_abs_logprob_diff,
            **({"routed": self.routed} if self.routed else {}),
        }

    @classmethod
    def of_state(cls, state: dict) -> "Tally":
        """Return the tally that `state` wrote down."""
        sums = [torch.tensor(row, dtype=torch.float64) for row in state["sums"]]
        return cls(sums, list(state["tokens"]), state["max_abs_logprob_diff"], list(state.get("routed", [])))

    def finite(self) -> bool:
        """Tell whether every sum is finite, which NaN or Inf in logits leaves no sum to be."""
        return all(bool(row.isfinite().all()) for row in self.sums)

    def kl(self) -> float:
        """Return the KL so far, nats per token."""
        return self._mean("kl")[0]

    def baseline(self) -> Baseline:
        """Return the dense model's means. Raises InputError where one is not finite or the perplexity overflows."""
        nll, correct = (self._mean(name)[0] for name in ("nll_dense", "correct_dense"))
        return Baseline(nll=nll, ppl=perplexity(nll), top1_accuracy=correct, tokens=sum(self.tokens))

    def comparison(self) -> Comparison:
        """Return the planned model's means against the dense model's. Raises InputError as `baseline` does."""
        kl, kl_stderr = self._mean("kl")
        nll_increase, nll_increase_stderr = self._mean("nll", minus="nll_dense")
        accuracy_drop, accuracy_drop_stderr = self._mean("correct_dense", minus="correct")
        agreement, agreement_stderr = self._mean("agree")
        nll, dense = self._mean("nll")[0], self._mean("nll_dense")[0]
        return Comparison(
            kl=kl,
            kl_stderr=kl_stderr,
            nll_increase=nll_increase,
            nll_increase_stderr=nll_increase_stderr,
            ppl=perplexity(nll),
            ppl_increase=math.expm1(nll - dense),
            accuracy_drop=accuracy_drop,
            accuracy_drop_stderr=accuracy_drop_stderr,
            top1_agreement=agreement,
            top1_agreement_stderr=agreement_stderr,
            max_abs_logprob_diff=self.max_abs_logprob_diff,
            routed_as_dense=sum(self.routed) / sum(self.tokens) if self.routed else None,
            tokens=sum(self.tokens),
            sequences=len(self.tokens),
        )

    def _mean(self, name: str, *, minus: str | None = None) -> tuple[float, float | None]:
        """Return the mean per token of a field, less another, and its standard error over sequences; None of one alone.

        Raises InputError where the mean is not finite.
        """
        rows = torch.stack(self.sums)
        sums = rows[:, FIELDS.index(name)] - (rows[:, FIELDS.index(minus)] if minus else 0)
        mean, stderr = ratio_and_stderr(sums, torch.tensor(self.tokens, dtype=torch.float64))
        if not mean.isfinite():
            raise InputError(
                f"The {name} of a measurement is not finite: the model's weights or logits hold NaN or Inf."
            )
        return mean.item(), None if stderr is None else stderr.item()
