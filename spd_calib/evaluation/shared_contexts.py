"""Reading a context once for all the continuations that lm-eval asks about, such as the choices of a document.

lm-eval puts every continuation to the model with its context before it. Here those of one context stand behind it in
one row, each blind to the others and at the positions it would have alone: the same numbers but for rounding.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spd_calib.errors import InputError

from .quiet import Step

Request = tuple[Any, list[int], list[int]]  # lm-eval's name for it, and the token ids of context and continuation
Answer = tuple[float, bool]  # the continuation's log-probability, and whether every token of it is the likeliest
Ask = Callable[..., list[Answer]]
TOGETHER = 8  # choices of most documents
ROUNDING = 1e-4  # of log-probabilities in float32, relative where they exceed 1


@dataclass(frozen=True)
class Row:
    """A context and its continuations, one behind the other; `requests` are the places of these in lm-eval's list."""

    context: list[int]
    continuations: list[list[int]]
    requests: list[int]

    @property
    def tokens(self) -> list[int]:
        """Return what the model reads: nothing follows upon a continuation's last token, so it is left out."""
        return self.context + [token for c in self.continuations for token in c[:-1]]

    @property
    def positions(self) -> list[int]:
        """Return the position of each token."""
        n = len(self.context)
        return [*range(n), *(p for c in self.continuations for p in range(n, n + len(c) - 1))]

    @property
    def parts(self) -> list[int]:
        """Return for each token which continuation it is of, counted from 1; 0 of the context."""
        return [0] * len(self.context) + [i for i, c in enumerate(self.continuations, 1) for _ in c[:-1]]

    def answers(self, logits: Tensor) -> Iterator[Answer]:
        """Yield the answer for each continuation, from the logits [T, V] behind the row's tokens."""
        start = len(self.context)
        for continuation in self.continuations:
            end = start + len(continuation) - 1
            of_tokens = torch.cat([logits[len(self.context) - 1][None], logits[start:end]]).log_softmax(-1)
            wanted = torch.tensor(continuation, device=logits.device)
            found = of_tokens.gather(-1, wanted[:, None]).sum()
            yield float(found), bool((of_tokens.argmax(-1) == wanted).all())
            start = end


def share_contexts(model: Any, *, step: Step) -> None:
    """Have `model`, an HFLM of lm-eval, read a context once for all its continuations.

    Only where rounding does not show, in float32, and where the longest row of each call gives what its requests give
    one by one: a model with a window, or with positions of another kind, may not take a row like this. `step` is called
    for every answer.
    """
    takes = inspect.signature(model.model.forward).parameters
    if model.model.dtype == torch.float32 and model.mixed_precision_dtype is None and "position_ids" in takes:
        model._loglikelihood_tokens = _Sharing(model, model._loglikelihood_tokens, step)


@dataclass(frozen=True)
class _Sharing:
    """Takes the place of HFLM._loglikelihood_tokens, which is `ask`."""

    model: Any
    ask: Ask
    step: Step

    def __call__(self, requests: Sequence[Request], *args: Any, **kwargs: Any) -> list[Answer]:
        """Return the answer to every request, in order."""
        if any(not continuation for _, _, continuation in requests):
            raise InputError(
                "A document of the tasks has a choice without a token, which has no log-likelihood; mend it, or leave "
                "its task out."
            )
        rows = sorted(_rows(requests, self.model.max_length), key=lambda row: -len(row.tokens))
        found: dict[int, Answer] = {}
        # by each call's own rows alone: an evaluation that goes on after a kill decides as the one before it did
        if rows and self._is_sound(max(rows, key=_longest)):
            for i in range(0, len(rows), self.model.batch_size):
                for place, answer in self._answered(rows[i : i + self.model.batch_size]):
                    found[place] = answer
                    if (name := requests[place][0]) is not None:
                        self.model.cache_hook.add_partial("loglikelihood", name, answer)
                    self.step()
        others = [i for i in range(len(requests)) if i not in found]
        if others:
            asked = self.ask([requests[i] for i in others], *args, **kwargs)
            found.update(zip(others, asked, strict=True))
        return [found[i] for i in range(len(requests))]

    def _is_sound(self, row: Row) -> bool:
        """Say whether a row gives what its continuations give one by one, without a mask or positions of ours."""
        alone = [self._answered([Row(row.context, [c], [0])]) for c in row.continuations]
        return all(
            abs(a - b) <= ROUNDING * max(1.0, abs(b))
            for (_, (a, _)), [(_, (b, _))] in zip(self._answered([row]), alone, strict=True)
        )

    def _answered(self, rows: Sequence[Row]) -> list[tuple[int, Answer]]:
        """Run a batch of rows; return the place of each request, with its answer."""
        device, length = self.model.device, max(len(row.tokens) for row in rows)

        def padded(values: Sequence[list[int]], filling: int) -> Tensor:
            return torch.tensor([v + [filling] * (length - len(v)) for v in values], device=device)

        input_ids, parts = padded([r.tokens for r in rows], 0), padded([r.parts for r in rows], -1)
        plain = len(rows) == 1 and len(rows[0].continuations) == 1
        with torch.no_grad():
            logits = self.model.model(
                input_ids=input_ids,
                attention_mask=None if plain else _mask(parts, self.model.model.dtype),
                position_ids=None if plain else padded([r.positions for r in rows], 0),
                use_cache=False,
            ).logits
        return [
            (place, answer)
            for row, own in zip(rows, logits, strict=True)
            for place, answer in zip(row.requests, row.answers(own), strict=True)
        ]


def _rows(requests: Sequence[Request], max_length: int) -> list[Row]:
    """Return the contexts that several requests have in common, where nothing must be cut off.

    A row has TOGETHER continuations at most: attention over it is of all of them, and of an empty context (a BOS) there
    may be thousands.
    """
    by_context: dict[tuple[int, ...], list[int]] = {}
    for place, (_, context, continuation) in enumerate(requests):
        if len(context) + len(continuation) <= max_length + 1:
            by_context.setdefault(tuple(context), []).append(place)
    return [
        Row(list(context), [requests[i][2] for i in some], some)
        for context, places in by_context.items()
        for some in (places[at : at + TOGETHER] for at in range(0, len(places), TOGETHER))
        if len(some) > 1
    ]


def _longest(row: Row) -> int:
    """Return the tokens of a context and its longest continuation."""
    return len(row.context) + max(map(len, row.continuations))


def _mask(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what is added to the attention's scores, [B, 1, T, T], for the parts [B, T] of rows (-1: padding).

    A token attends to the context and to its own part, up to itself.
    """
    causal = torch.ones(parts.shape[1], parts.shape[1], dtype=torch.bool, device=parts.device).tril()
    seen = causal & ((parts[:, None, :] == 0) | (parts[:, None, :] == parts[:, :, None]))
    return torch.zeros(seen.shape, dtype=dtype, device=parts.device).masked_fill(~seen, torch.finfo(dtype).min)[:, None]
