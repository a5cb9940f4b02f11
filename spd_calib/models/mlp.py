"""The first half of an MLP, which is the same whoever runs it: the dense layer, a rank, or a search for neurons."""

from collections.abc import Callable, Sequence

from torch import Tensor


def activations(
    mlp_in: Sequence[Callable[[Tensor], Tensor]], activation: Callable[[Tensor], Tensor], u: Tensor
) -> Tensor:
    """Return the neurons' activations [..., neurons] where the MLP's first layers read u [..., d].

    With one layer in `mlp_in` that is act(first(u)); with two, the gate first, act(gate(u)) * up(u).
    """
    gate = activation(mlp_in[0](u))
    return gate if len(mlp_in) == 1 else gate * mlp_in[1](u)
