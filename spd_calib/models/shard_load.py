"""Loading one rank's share of a model, straight from the safetensors files: no process ever holds the whole.

Cut are the linear layers and the experts of the blocks, and an output head that is not tied to the embedding; the rest
(embeddings, norms, routers, the biases that are added after a sum) is whole on every rank.
"""

from collections.abc import Collection
from typing import Any

from transformers import PreTrainedModel

from .architecture import HeadCounts
from .checkpoint import Checkpoint
from .experts import expert_slices
from .fill import Own, fill
from .load import DTYPES, check_device, refusing_unreadable, skeleton
from .probe import find_layers
from .shard import ALL, RankSlices, channels, head_entries, linear_slices, vocabulary_slice
from .source import Source


def load_sharded(
    source: Source,
    config: Any,
    *,
    rank: int,
    tp: int,
    device: str,
    dtype: str,
    whole_attentions: Collection[int] = (),
) -> PreTrainedModel:
    """Return the model of rank `rank` of `tp` in eval mode: its linear layers hold the rank's slices only.

    The attentions of the blocks in `whole_attentions` are whole: there the rank may compute other ranks' heads, too.
    Raises InputError where the folder's tensors are not the model's, or a share does not fit on the device.
    """
    check_device(device)
    model = skeleton(source, config, dtype=dtype)
    own = own_slices(model, rank=rank, tp=tp, whole_attentions=whole_attentions)
    stored = Checkpoint(source, model)
    too_large = (
        f"A rank's share of {source.id} does not fit on {device} in {dtype}; use more ranks or a narrower dtype."
    )
    with refusing_unreadable(source, too_large):
        fill(model, stored, own=own, device=device, dtype=DTYPES[dtype])
    return model


def own_slices(model: PreTrainedModel, *, rank: int, tp: int, whole_attentions: Collection[int] = ()) -> Own:
    """Return what a rank owns of each parameter that is cut, as (rows, columns) (docs/design.md, section 2).

    Nothing is cut of the attentions of the blocks in `whole_attentions`.
    """
    names = {module: name for name, module in model.named_modules()}
    own: Own = {}
    for index, parts in enumerate(find_layers(model)):
        slices = RankSlices.of(HeadCounts.of(parts), rank, tp)
        whole = set(parts.attention.modules()) if index in whole_attentions else set()
        for linear, rows, columns in linear_slices(parts, slices):
            if linear not in whole:
                own[f"{names[linear]}.weight"] = (rows, columns)
                own[f"{names[linear]}.bias"] = (rows, ALL)
        if not whole:
            own_heads, _ = head_entries(parts, slices)
            own |= {f"{names[parts.attention]}.{name}": ((own_heads,), ALL) for name in parts.head_parameters}
        if parts.convolution is not None and not whole:
            own[f"{names[parts.convolution]}.weight"] = (channels(parts, slices), ALL)
        if (mixture := parts.experts) is not None:
            of_experts = expert_slices(mixture, slices)
            own |= {f"{names[mixture.experts]}.{name}": cut for name, cut in of_experts.items()}
    head = model.get_output_embeddings()
    if head.weight is not model.get_input_embeddings().weight:
        rows = (vocabulary_slice(head.out_features, rank=rank, tp=tp),)
        own[f"{names[head]}.weight"] = (rows, ALL)
        own[f"{names[head]}.bias"] = (rows, ALL)
    return own
