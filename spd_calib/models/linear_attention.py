"""Linear attention (Gated DeltaNet) on one rank's heads: what it has beside linear layers, and how it is called.

Its convolution mixes no channels, so a rank's are those of its own queries, keys and values.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class RankChannels(nn.Module):
    """Some channels of a convolution by channel whose weight it shares; the attention convolves with that itself.

    Of a convolution that is cut to the rank's channels already, all of them. They are taken anew in each forward, since
    the weight may be trained or moved.
    """

    bias = None

    def __init__(self, convolution: nn.Conv1d, rows: tuple[slice, ...]):
        super().__init__()
        self.whole, self.rows = convolution, rows

    @property
    def weight(self) -> Tensor:
        """Return the weights [channels, 1, width]."""
        whole = self.whole.weight
        is_cut = len(whole) != self.whole.out_channels
        return whole if is_cut else torch.cat([whole[r] for r in self.rows])


def cut(shard: Any, convolution: nn.Conv1d, rows: tuple[slice, ...]) -> None:
    """Give a rank's copy of the attention its own channels, and have it called as a softmax attention is."""
    name = next(n for n, m in shard.named_children() if m is convolution)
    setattr(shard, name, RankChannels(convolution, rows))
    shard.forward = partial(as_attention, shard.forward)


def counts(attention: Any, *, heads: int, kv_heads: int) -> dict[str, int]:
    """Return the attributes by which the attention takes its queries, keys and values apart, for so many heads."""
    return {
        "num_v_heads": heads,
        "num_k_heads": kv_heads,
        "value_dim": heads * attention.head_v_dim,
        "key_dim": kv_heads * attention.head_k_dim,
    }


def as_attention(forward: Any, *, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
    """Call a linear attention with what a decoder layer hands a softmax attention; return what that would.

    It knows no positions, and its cache under another name.
    """
    cache = kwargs.pop("past_key_values", None)
    others = {name: value for name, value in kwargs.items() if not name.startswith("position_")}
    return forward(hidden_states=hidden_states, cache_params=cache, **others), None
