"""Where in a model NaN or Inf first appears: asked only once something was found that is not finite.

The weights are finite, models.load sees to that; so something in the model overflows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spd_calib.errors import InputError
from spd_calib.models.architecture import Decoder, LayerParts

from .comm import Comm
from .streams import Streams

if TYPE_CHECKING:
    from .model import TensorParallelLM


@dataclass(frozen=True)
class Place:
    """A module of a model, in words; `rank` where it is one rank's own."""

    words: str
    module: nn.Module
    rank: int | None = None


def refuse_not_finite(lm: TensorParallelLM, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
    """Raise InputError that says where NaN or Inf first appears when `lm`, as it is set, reads these tokens [B, T].

    All of several real ranks call this at once, and raise with the same words.
    """
    fits = attention_mask is not None and attention_mask.shape == input_ids.shape  # else a cache held what came before
    places, dtype = _places_of(lm), lm.model.dtype
    where = first_not_finite(lambda: lm(input_ids, attention_mask if fits else None), places, dtype, lm.comm)
    raise InputError(where or "The logits hold NaN or Inf under this plan: it breaks the model; drop less.")


@contextmanager
def refusing_not_finite(lm: TensorParallelLM) -> Iterator[None]:
    """While this lasts, a forward of `lm.model` whose logits are not finite ends in refuse_not_finite."""

    def check(_: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if not output.logits.isfinite().all():
            hook.remove()
            input_ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            refuse_not_finite(lm, input_ids, kwargs.get("attention_mask"))

    hook = lm.model.register_forward_hook(check, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def first_not_finite(
    run: Callable[[], Any], places: Sequence[Place], dtype: torch.dtype, comm: Comm | None = None
) -> str | None:
    """A sentence on the place whose output, in `run`, is the first to hold NaN or Inf; None where all is finite.

    Where `comm` joins real ranks, all of them call this at once, with as many places in the same order; what any of
    them found first counts.
    """
    found: list[int] = []

    def look(index: int) -> Callable[[nn.Module, tuple, Any], None]:
        def hook(_: nn.Module, args: tuple, output: Any) -> None:
            if not found and not all(t.isfinite().all() for t in _tensors(output)):
                found.append(index)

        return hook

    hooks = [place.module.register_forward_hook(look(i)) for i, place in enumerate(places)]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    index, rank = (found or [len(places)])[0], None
    if comm is not None and len(comm.ranks) < comm.size:
        own = torch.tensor([index], device=next(places[-1].module.parameters()).device)
        told = comm.all_gather([own]).tolist()
        index, rank = min((place, r) for r, place in enumerate(told))
    if index == len(places):
        return None
    place, name = places[index], str(dtype).removeprefix("torch.")
    words = place.words + ("" if place.rank is None else f" of rank {place.rank if rank is None else rank}")
    way_out = "take --dtype bfloat16 or float32" if dtype == torch.float16 else "this checkpoint cannot be used"
    return f"NaN or Inf first appears in {words}: its numbers become too large for {name}; {way_out}."


def places_of_dense(model: nn.Module, head: nn.Module, decoder: Decoder, parts: Sequence[LayerParts]) -> list[Place]:
    """Of a model as transformers loads it."""
    places = _embeddings(model)
    for i, (layer, p) in enumerate(zip(decoder.layers, parts, strict=True)):
        words = f"block {i} ({decoder.path}.{i})"
        places += [Place(f"{words}, attention", p.attention), Place(f"{words}, MLP", p.down)]
        places.append(Place(f"{words}, the sum behind its MLP", layer))
    return [*places, Place("the output head", head)]


def _places_of(lm: TensorParallelLM) -> list[Place]:
    """Of a model on the ranks of this process."""
    places = _embeddings(lm.model)
    for block, path in zip(lm.blocks, lm.module_paths, strict=True):
        words = f"block {block.index} ({path})"
        # o_proj, not the attention itself: the ranks' attentions are copies that share their hooks
        places += [Place(f"{words}, attention", o, r) for r, o in zip(lm.comm.ranks, block.outs, strict=True)]
        places += [Place(f"{words}, MLP", mlp, r) for r, mlp in zip(lm.comm.ranks, block.mlps, strict=True)]
        places.append(Place(f"{words}, the sum behind its MLP", block))
    return [*places, Place("the output head", lm.head)]


def _embeddings(model: nn.Module) -> list[Place]:
    return [Place("the embeddings", m) for m in model.modules() if isinstance(m, nn.Embedding)]


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Streams):
        return [output.shared, *(output.debt or []), *(output.written_off or [])]
    if isinstance(output, tuple | list):
        output = output[0]
    return [output] if isinstance(output, Tensor) else []
