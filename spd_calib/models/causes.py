"""Saying why a folder's tensors are not its model's: the first of them, how many there are, the likely cause.

The causes are guesses from names, and change nothing about what is refused.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence

from torch import Tensor

from .quantised import ORIGINAL, Piece
from .stored import StoredTensor

BLOCK = re.compile(r"\.layers\.(\d+)\.")
QUANTISED = re.compile(
    r"(scales?|scale_inv|zero_points?|qweight|qzeros|g_idx|absmax|quant_map|quant_state\S*|weight_packed|SCB|\S*_scales?)$"
)
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module")
"""Put by torch.compile, FSDP, activation checkpointing and DataParallel into the names of what they wrap."""
FETCH = "fetch the model again, or convert it"


def foreign_number(model: str, tensors: Sequence[StoredTensor], *, scheme: str | None) -> str:
    """Return the sentence for tensors of a kind of number that no weight is read from.

    `scheme` is the one by which the configuration says that the weights are quantised, if it does.
    """
    if scheme is not None:
        return (
            f"{model} holds {_counted(tensors)} as {tensors[0].dtype} without what the scheme of its configuration "
            f"({scheme}) has beside it; {FETCH}."
        )
    return (
        f"{model} holds {_counted(tensors)} as {tensors[0].dtype}, as in a quantised checkpoint, though its "
        f"configuration does not say so; {ORIGINAL}."
    )


def missing(
    model: str,
    lost: Sequence[str],
    *,
    wanted: Mapping[str, Tensor],
    unread: Sequence[Piece],
    rename: Callable[[str], str],
) -> str:
    """Return the sentence for parameters `lost`, of all those `wanted`, that no stored tensor is for.

    `unread` are the stored tensors that no parameter takes; `rename` turns a stored name into the model's.
    """
    more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
    said = f"The weights of {model} lack {lost[0]}{more} of the {len(wanted)} tensors that its configuration asks for"
    return f"{said}: {_why_missing(lost, wanted, unread=unread, rename=rename)}."


def _why_missing(
    lost: Sequence[str],
    wanted: Mapping[str, Tensor],
    *,
    unread: Sequence[Piece],
    rename: Callable[[str], str],
) -> str:
    """Return the likely cause of missing tensors, and the way out."""
    missed = set(lost)
    for tensor in unread:
        if wrapping := _wrapping(tensor.name, missed, rename=rename):
            return (
                f"its names have {wrapping!r} in them ({tensor.name}), left by what the model was wrapped in when it "
                "was saved; save it again without"
            )
    if quantised := [t for t in unread if QUANTISED.search(t.name)]:
        return f"it is quantised ({quantised[0].name}); {ORIGINAL}"
    blocks, of_config = _blocks(set(wanted) - missed), _blocks(wanted)
    if empty := sorted(of_config - blocks):
        if blocks and empty[0] > max(blocks):
            return (
                f"its configuration says num_hidden_layers {len(of_config)}, and the weights hold {len(blocks)} "
                "blocks; correct that number, or fetch the model again"
            )
        return f"they hold nothing of block {empty[0]}; {FETCH}"
    if all("lm_head" in n for n in lost):
        return (
            "an output head is asked for, since tie_word_embeddings is false, and none is stored; set that to true if "
            "the model shares its embedding, or name a checkpoint of the whole causal language model"
        )
    for block in sorted(_blocks(missed)):
        attention = {n for n in wanted if f".layers.{block}." in n and "attn." in n}
        if attention and attention <= missed:
            return f"block {block} holds no attention, it may have been pruned away; name the model as it was before"
    if unread:
        return f"what it holds instead, such as {unread[0].name}, the model has no place for; {FETCH}"
    return f"no weight file holds it; {FETCH}" if len(lost) == 1 else f"no weight file holds them; {FETCH}"


def left_over(model: str, unread: Sequence[Piece], *, wanted: Collection[str]) -> str:
    """Return the sentence for stored tensors that no parameter of `wanted` takes."""
    said = f"{model} holds {_counted(unread)}, which the model of its configuration does not read"
    names = [t.name for t in unread]
    if quantised := [n for n in names if QUANTISED.search(n)]:
        return f"{said}: it is quantised ({quantised[0]}), though its configuration does not say so; {ORIGINAL}."
    if adapter := [n for n in names if "lora_" in n]:
        return f"{said}: they are an adapter's ({adapter[0]}); merge it into the weights first."
    blocks, of_config = _blocks(names), _blocks(wanted)
    if blocks and of_config and (beyond := sorted(blocks - of_config)):
        return (
            f"{said}: they are of block {beyond[0]}, and the configuration says num_hidden_layers {len(of_config)}; "
            "correct that number, or remove the tensors."
        )
    if all(n.endswith("bias") for n in names):
        return f"{said}: it switches these biases off; correct it (attention_bias, mlp_bias or the like)."
    return f"{said}: what they would change is not known; correct its config.json, or remove the tensors."


def _wrapping(stored: str, missed: Collection[str], *, rename: Callable[[str], str]) -> str:
    """Return the part of a stored name without which it would be one of `missed`; "" where there is none."""
    parts = stored.split(".")
    for wrapper in WRAPPERS:
        if wrapper in parts and rename(".".join(p for p in parts if p != wrapper)) in missed:
            return f"{wrapper}."
    shortened = {".".join(parts[:first]) + ".": ".".join(parts[first:]) for first in range(1, len(parts) - 1)}
    exact = [prefix for prefix, rest in shortened.items() if rest in missed]
    renamed = [prefix for prefix, rest in shortened.items() if rename(rest) in missed]
    return next(iter([*exact, *renamed]), "")


def _blocks(names: Collection[str]) -> set[int]:
    """Return the indices of the blocks that names of tensors speak of."""
    return {int(found[1]) for name in names if (found := BLOCK.search(f".{name}"))}


def _counted(tensors: Sequence[Piece]) -> str:
    """Return the first tensor's name, and how many come with it."""
    return tensors[0].name + (f" and {len(tensors) - 1} more" if len(tensors) > 1 else "")
