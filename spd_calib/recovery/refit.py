"""Refitting a block's weights, without training, so that the planned model does what the dense one did. Free to run.

What a layer behind a norm reads in the planned model, u_r on rank r, is not what it reads in the dense one, u. The map
u_r -> u_r (I + M_r) that comes nearest to u (ridge regression) is put into the rank's rows of q, k, v, and of the MLP's
first layers: W <- W (I + M_r)^T. What is missing at the block's output after that is put into down_proj, all ranks'
slices in one regression on the neurons as each rank computes them. Ranks' rows and columns do not overlap, so they
remain one dense layer.

Tokens are weighed by 1 / |y|^2, y the dense block's output, for the norms that read it: a few tokens (the first of a
sequence above all) carry a norm hundreds of times that of the rest, and would be all that a plain fit sees.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spd_calib.models.architecture import LinearRows
from spd_calib.models.mlp import activations
from spd_calib.models.shard import ALL_ROWS, RankLinear, Rows
from spd_calib.parallel.streams import keep

from .feed import Batch, Feed
from .reads import mlp_reads, settled
from .ridge import Products, Ridge
from .student import Student

OUTLIER = 4.0  # times the median |y|^2: a token above it counts as much as one with that
Detail = dict[str, dict | None]


@torch.no_grad()
def refit_attention(student: Student, feed: Feed) -> Detail:
    """Refit q, k and v of the feed's present block in place; return what the report says of each.

    One map for all ranks, so a KV head that ranks share stays shared. Nothing is done where ranks' streams differ.
    """
    parts, dense = student.parts, feed.model.lm.blocks[feed.index]
    layers = {"q": parts.q, "k": parts.k, "v": parts.v}
    if not all(feed.inputs(batch).agree for batch in feed.batches):
        return {}
    constant = all(layer.bias is not None for layer in layers.values())
    fitting, choosing = Products(), Products()
    for products, batches in ((fitting, feed.fitting), (choosing, feed.choosing)):
        for batch in batches:
            read = student.block.norm1(feed.inputs(batch).shared)[batch.mask]
            should = dense.norm1(batch.dense)[batch.mask]
            products.add(_features(read, constant), should - read)
    ridge = Ridge(fitting, choosing)
    return {name: _refit_inputs([layer], ALL_ROWS, ridge) for name, layer in layers.items()}


@torch.no_grad()
def refit_mlp_inputs(student: Student, feed: Feed) -> Detail:
    """Refit each rank's rows of gate and up (or of the one first layer) in place; return what the report says."""
    parts, block, dense = student.parts, student.block, feed.model.lm.blocks[feed.index]
    constant = all(layer.bias is not None for layer in parts.mlp_in)
    ranks = range(block.comm.size)
    fitting, choosing = [Products() for _ in ranks], [Products() for _ in ranks]
    for products, batches in ((fitting, feed.fitting), (choosing, feed.choosing)):
        for batch in batches:
            should = dense.norm2(feed.dense_read(batch))[batch.mask]
            s = feed.inputs(batch)
            reads = mlp_reads(student, s, *block.attend(s, **feed.kwargs(batch)))
            for rank in ranks:
                read = block.norm2(reads.read(rank))[batch.mask]
                products[rank].add(_features(read, constant), should - read)
    return {
        f"rank {rank}": _refit_inputs(parts.mlp_in, _rows(student, rank), Ridge(fitting[rank], choosing[rank]))
        for rank in ranks
    }


@torch.no_grad()
def refit_down(student: Student, feed: Feed) -> Detail:
    """Refit down_proj in place, to leave the block where the dense model does; return what the report says."""
    parts = student.parts
    fitting, choosing = Products(), Products()
    for products, batches in ((fitting, feed.fitting), (choosing, feed.choosing)):
        for batch in batches:
            should = feed.dense_output(batch)[batch.mask]
            before, neurons = _before_down(student, feed, batch)
            missing = (should - before) / parts.scale - parts.down(neurons)
            products.add(_features(neurons, parts.down.bias is not None), missing, weights=token_weights(should))
    fit = Ridge(fitting, choosing).best()
    if fit is None:
        return {"down": None}
    change = fit.change.to(parts.down.weight.dtype)
    parts.down.weight += change[: parts.down.in_features].T
    if parts.down.bias is not None:
        parts.down.bias += change[-1]  # type: ignore[misc]
    return {"down": fit.detail()}


@torch.no_grad()
def output_error(student: Student, feed: Feed, batches: Sequence[Batch], *, metric: Tensor | None = None) -> float:
    """Return E |planned - dense|^2 / E |dense|^2 at the output of the feed's present block.

    `metric` [d, d] is the one in which both are measured (moments.output_gradient_moments), tokens alike but for those
    with a norm far above the median's; by default the plain one, with token_weights.
    """
    wrong = size = 0.0
    for batch in batches:
        should = feed.dense_output(batch)[batch.mask]
        error = settled(student.run(feed.inputs(batch), **feed.kwargs(batch)))[batch.mask] - should
        weights = token_weights(should)
        if metric is not None:
            weights = weights.clamp(max=weights.median() / OUTLIER)
        wrong += (_squares(error, metric) * weights).sum().item()
        size += (_squares(should, metric) * weights).sum().item()
    return wrong / max(size, 1e-30)


def _squares(x: Tensor, metric: Tensor | None) -> Tensor:
    """Return |x|^2 [N] in the metric."""
    return (x * (x if metric is None else x @ metric.to(x))).sum(-1)


def token_weights(y: Tensor) -> Tensor:
    """Return 1 / mean(y^2) of each token [N], y [N, d]."""
    return 1 / y.square().mean(-1).clamp(min=1e-12)


def _before_down(student: Student, feed: Feed, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the residual stream that the MLP adds to [N, d], all debts settled, and all neurons [N, neurons]."""
    block, s = student.block, feed.inputs(batch)
    partials, heads = block.attend(s, **feed.kwargs(batch))
    reads = mlp_reads(student, s, partials, heads)
    neurons = [
        activations(list(mlp.mlp_in), mlp.activation, block.norm2(reads.read(rank))[batch.mask], neurons=mlp.neurons)  # type: ignore[arg-type]
        for rank, mlp in enumerate(block.mlps)
    ]
    return settled(keep(s, partials, block.o_bias, block.comm))[batch.mask], torch.cat(neurons, -1)


def _refit_inputs(layers: Sequence[nn.Linear | LinearRows], rows: Rows, ridge: Ridge) -> dict | None:
    """Put the map that these rows of `layers` lose least with into them; None where it is no gain."""
    weights = torch.cat([layer.weight[r].double() for layer in layers for r in rows])
    fit = ridge.best(weights.T @ weights)
    if fit is None:
        return None
    d = weights.shape[1]
    for layer, r in ((layer, r) for layer in layers for r in rows):
        w = layer.weight[r].double()
        if len(fit.change) > d and layer.bias is not None:
            layer.bias[r] += (w @ fit.change[d]).to(layer.bias.dtype)
        layer.weight[r] += (w @ fit.change[:d].T).to(layer.weight.dtype)
    return fit.detail()


def _rows(student: Student, rank: int) -> Rows:
    """Return the rank's neurons, in a fused layer of gate and of up."""
    first = student.block.mlps[rank].mlp_in[0]  # type: ignore[index]
    assert isinstance(first, RankLinear)
    return first.rows


def _features(x: Tensor, constant: bool) -> Tensor:
    """Return x [N, p], with a column of ones behind it if `constant`: where there is a bias to put it into."""
    return torch.cat([x, x.new_ones(len(x), 1)], -1) if constant else x
