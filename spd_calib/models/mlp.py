"""The first half of an MLP, which is the same whoever runs it: the dense layer, a rank, or a search for neurons."""

from collections.abc import Callable, Sequence

from torch import Tensor


def activations(
    mlp_in: Sequence[Callable[[Tensor], Tensor]], activation: Callable[[Tensor], Tensor], u: Tensor, *, neurons: int
) -> Tensor:
    """Return the neurons' activations [..., neurons] where the MLP's first layers read u [..., d].

    Where `mlp_in` gives `neurons` numbers that is act(first); where it gives twice as many, from two layers or from a
    fused one, act(gate) * up, the gate coming first.
    """
    first, *second = [piece for linear in mlp_in for piece in linear(u).split(neurons, dim=-1)]
    return activation(first) * second[0] if second else activation(first)
