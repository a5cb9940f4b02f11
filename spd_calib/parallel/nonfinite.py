"""Finding where in a model NaN or Inf first appears, once its logits were found to hold any.

The weights themselves are finite (models/checkpoint.py refuses others), so something that the model computes overflows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spd_calib.models.architecture import Decoder
from spd_calib.models.parts import LayerParts

from .block import Block
from .comm import Comm
from .streams import Streams


@dataclass(frozen=True)
class Place:
    """A module of a model, and the words for it in a message; `rank` where it is one rank's own."""

    words: str
    module: nn.Module
    rank: int | None = None


@torch.no_grad()
def first_nonfinite(
    run: Callable[[], Any], places: Sequence[Place], *, dtype: torch.dtype, comm: Comm | None = None
) -> str | None:
    """Call `run`, which runs the model, and return a sentence that names the first place to give NaN or Inf.

    Returns None where all outputs of `places` are finite. Where `comm` joins real ranks, all of them call this at
    once, each with the same number of places in the same order; the earliest place that any of them found is named.
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
        index, rank = min((of_rank, r) for r, of_rank in enumerate(told))
    if index == len(places):
        return None
    place, name = places[index], str(dtype).removeprefix("torch.")
    words = place.words + ("" if place.rank is None else f" of rank {place.rank if rank is None else rank}")
    way_out = "take the dtype bfloat16 or float32" if dtype == torch.float16 else "this checkpoint cannot be used"
    return f"NaN or Inf first appears in {words}: its numbers become too large for {name}; {way_out}."


def places_of_dense(model: nn.Module, head: nn.Module, *, decoder: Decoder, parts: Sequence[LayerParts]) -> list[Place]:
    """Return the places of a model as transformers loads it."""
    places = _embeddings(model)
    for i, (layer, p) in enumerate(zip(decoder.layers, parts, strict=True)):
        words = f"block {i} ({decoder.path}.{i})"
        mlp = p.experts.experts if p.experts else p.down
        places += [Place(f"{words}, attention", p.attention), Place(f"{words}, MLP", mlp)]
        places.append(Place(f"{words}, the sum behind its MLP", layer))
    return [*places, Place("the output head", head)]


def places_on_ranks(model: nn.Module, blocks: Sequence[Block], paths: Sequence[str], head: nn.Module) -> list[Place]:
    """Return the places of a model on the ranks of this process; `paths` name its blocks in transformers' model."""
    places = _embeddings(model)
    for block, path in zip(blocks, paths, strict=True):
        words, ranks = f"block {block.index} ({path})", block.comm.ranks
        # o_proj, not the attention itself: the ranks' attentions are copies that share their hooks
        places += [Place(f"{words}, attention", o, r) for r, o in zip(ranks, block.outs, strict=True)]
        places += [Place(f"{words}, MLP", mlp, r) for r, mlp in zip(ranks, block.mlps, strict=True)]
        places.append(Place(f"{words}, the sum behind its MLP", block))
    return [*places, Place("the output head", head)]


def _embeddings(model: nn.Module) -> list[Place]:
    return [Place("the embeddings", m) for m in model.modules() if isinstance(m, nn.Embedding)]


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Streams):
        waiting = [partial for part in output.waiting for partial in part.partials]
        return [output.shared, *(output.debt or []), *(output.written_off or []), *waiting]
    if isinstance(output, tuple | list):
        output = output[0]
    return [output] if isinstance(output, Tensor) else []
