"""Refitting a block's weights, without training, so that the planned model does what the dense one did. Free to run.

What a layer behind a norm reads in the planned model, u_r on rank r, is not what it reads in the dense one, u. The map
u_r -> u_r (I + M_r) that comes nearest to u (ridge regression) is put into the rank's rows of q, k, v, and of the MLP's
first layers: W <- W (I + M_r)^T. What is missing in the residual stream is put into o_proj, as far as the heads tell
it, and, at the block's output, into down_proj, all ranks' slices in one regression on the neurons as each rank computes
them. Ranks' rows and columns do not overlap, so they remain one dense layer.

Each token counts by what an error there costs in KL (error_cost.py): the few that all others read, and that are hardest
to get right, would else be lost among the rest.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spd_calib.formats.drops import KEPT
from spd_calib.models.mlp import activations
from spd_calib.models.parts import LayerParts, LinearRows
from spd_calib.models.shard import ALL_ROWS, RankLinear, Rows

from .error_cost import ErrorCost, bounded, costs_of_errors, token_weights
from .feed import Batch, Feed
from .reads import mlp_reads, settled
from .ridge import Products, Ridge, RidgeFit
from .student import Student

Detail = dict[str, dict | None]
Fits = Sequence[RidgeFit | None]


@torch.no_grad()
def refit_attention(student: Student, feed: Feed, *, cost: ErrorCost | None = None) -> Detail:
    """Refit q, k and v of the feed's present block in place, or what else reads the stream; return the report's part.

    `cost` is that of errors at the output of the block before, which they read. One map for all ranks, so a KV head
    that ranks share stays shared. Nothing is done where ranks' streams differ.
    """
    parts, dense = student.parts, feed.model.lm.blocks[feed.index]
    layers = parts.reading
    if not all(feed.inputs(batch).agree for batch in feed.batches):
        return {}
    constant = all(layer.bias is not None for layer in layers.values())
    fitting, choosing = Products(), Products()
    for products, batches in zip((fitting, choosing), feed.regressed, strict=True):
        for batch in batches:
            read = student.block.norm1(feed.inputs(batch).shared)[batch.mask]
            should = dense.norm1(batch.dense)[batch.mask]
            weights = weights_of_reads(cost, batch, output=batch.dense, part=batch.dense)
            products.add(_features(read, constant), should - read, weights=weights)
    ridge = Ridge(fitting, choosing)
    return {name: _put([layer], ALL_ROWS, _fit_for([layer], ridge)) for name, layer in layers.items()}


@torch.no_grad()
def refit_o(student: Student, feed: Feed, *, cost: ErrorCost | None = None) -> Detail:
    """Refit o_proj in place, so that the MLP's residual stream is the dense model's; return what the report says."""
    parts = student.parts
    fitting, choosing = Products(), Products()
    for products, batches in zip((fitting, choosing), feed.regressed, strict=True):
        for batch in batches:
            block, s = student.block, feed.inputs(batch)
            partials, heads = block.attend(s, **feed.kwargs(batch))
            before, _ = block.behind_attention(KEPT, s, partials, heads)
            should, z = feed.dense_read(batch)[batch.mask], torch.cat(heads, -1)[batch.mask]
            missing = should - settled(before)[batch.mask]
            weights = bounded(token_weights(cost, feed.dense_output(batch), batch), missing, of=should)
            if parts.attention_out_norm is None:
                missing = missing / parts.o_scale
            else:
                norm, total = parts.attention_out_norm, parts.o(z)
                missing, weights = _before_norm(missing / parts.scale, weights, norm=norm, of=total)
            products.add(_features(z, parts.o.bias is not None), missing, weights=weights)
    return {"o": _add(parts.o, Ridge(fitting, choosing).best())}


@torch.no_grad()
def fit_mlp_reads(student: Student, feed: Feed, *, cost: ErrorCost | None = None) -> Fits:
    """Return, for each rank, the change M_r of what its MLP reads; None where none is a gain."""
    parts, block, dense = student.parts, student.block, feed.model.lm.blocks[feed.index]
    constant = all(layer.bias is not None for layer in parts.mlp_in)
    ranks = range(block.comm.size)
    fitting, choosing = [Products() for _ in ranks], [Products() for _ in ranks]
    for products, batches in zip((fitting, choosing), feed.regressed, strict=True):
        for batch in batches:
            h, y = feed.dense_read(batch), feed.dense_output(batch)
            weights = weights_of_reads(cost, batch, output=y, part=_unscaled(y, parts) - h)
            should = dense.norm2(h)[batch.mask]
            s = feed.inputs(batch)
            kwargs = feed.kwargs(batch)
            reads = mlp_reads(student, s, *block.attend(s, **kwargs), **kwargs)
            for rank in ranks:
                read = block.norm2(reads.read(rank))[batch.mask]
                products[rank].add(_features(read, constant), should - read, weights=weights)
    return [_fit_for(parts.mlp_in, Ridge(fitting[rank], choosing[rank])) for rank in ranks]


@torch.no_grad()
def put_into_mlp_inputs(student: Student, fits: Fits) -> Detail:
    """Put each rank's change into its rows of gate and up (or of the one first layer), in place."""
    return {f"rank {rank}": _put(student.parts.mlp_in, _rows(student, rank), fit) for rank, fit in enumerate(fits)}


def refit_mlp_inputs(student: Student, feed: Feed, *, cost: ErrorCost | None = None) -> Detail:
    """Refit each rank's rows of gate and up in place; return what the report says of each."""
    return put_into_mlp_inputs(student, fit_mlp_reads(student, feed, cost=cost))


@torch.no_grad()
def refit_down(student: Student, feed: Feed, *, cost: ErrorCost | None = None) -> Detail:
    """Refit down_proj in place, to leave the block where the dense model does; return what the report says."""
    parts = student.parts
    fitting, choosing = Products(), Products()
    for products, batches in zip((fitting, choosing), feed.regressed, strict=True):
        for batch in batches:
            should = _unscaled(feed.dense_output(batch), parts)[batch.mask]
            before, neurons = _before_down(student, feed, batch)
            wanted, given = (should - before) / parts.scale, parts.down(neurons)
            missing = wanted - (given if parts.mlp_out_norm is None else parts.mlp_out_norm(given))
            weights = token_weights(cost, feed.dense_output(batch), batch)
            weights = bounded(weights, missing, of=should / parts.scale)
            if parts.mlp_out_norm is not None:
                missing, weights = _before_norm(missing, weights, norm=parts.mlp_out_norm, of=given)
            products.add(_features(neurons, parts.down.bias is not None), missing, weights=weights)
    return {"down": _add(parts.down, Ridge(fitting, choosing).best())}


def _unscaled(y: Tensor, parts: LayerParts) -> Tensor:
    """Return the residual stream that a block gives as it was before the block multiplied it by its number, if any."""
    return y if parts.stream_scale is None else y / parts.stream_scale()


def _before_norm(missing: Tensor, weights: Tensor, *, norm: nn.Module, of: Tensor) -> tuple[Tensor, Tensor]:
    """Return what is to be added to `of` [N, d] so that `norm` of it gains about `missing`, and weights to fit it by.

    To first order, the size of `of` held fast: an RMSNorm multiplies channel c by w_c / rms(of), w what it gives for
    ones, so missing_c takes missing_c rms(of) / w_c. Errors are small where rms(of) is large: weights [N] become
    weights / rms(of)^2. Channels that the norm all but cuts off are left alone.
    """
    w, size = norm(torch.ones_like(of[:1])), of.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12)
    through = w.abs() > 1e-2 * w.abs().mean()
    return torch.where(through, missing * size / torch.where(through, w, 1.0), 0.0), weights / size[:, 0].square()


@torch.no_grad()
def output_error(student: Student, feed: Feed, batches: Sequence[Batch], *, cost: ErrorCost | None = None) -> float:
    """Return E |planned - dense|^2 / E |dense|^2 at the output of the feed's present block, under `cost`.

    No token counts as more than all of it wrong.
    """
    wrong = size = 0.0
    for batch in batches:
        should = feed.dense_output(batch)
        error = settled(student.run(feed.inputs(batch), **feed.kwargs(batch))) - should
        wrong += costs_of_errors(cost, error[batch.mask], should, batch).sum().item()
        size += costs_of_errors(cost, should[batch.mask], should, batch).sum().item()
    return wrong / max(size, 1e-30)


def weights_of_reads(cost: ErrorCost | None, batch: Batch, *, output: Tensor, part: Tensor) -> Tensor:
    """Return what a share of error in `part` of the output costs, [N]: a read is of unit size behind its norm."""
    squares = part[batch.mask].square().mean(-1)
    if cost is None:
        return torch.full_like(squares, batch.weight)
    return token_weights(cost, output, batch) * squares


def _before_down(student: Student, feed: Feed, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the residual stream that the MLP adds to [N, d], all debts settled, and all neurons [N, neurons]."""
    block, s = student.block, feed.inputs(batch)
    partials, heads = block.attend(s, **feed.kwargs(batch))
    reads = mlp_reads(student, s, partials, heads, **feed.kwargs(batch))
    neurons = [
        activations(list(mlp.mlp_in), mlp.activation, block.norm2(reads.read(rank))[batch.mask], neurons=mlp.neurons)  # type: ignore[arg-type]
        for rank, mlp in enumerate(block.mlps)
    ]
    kept, _ = block.behind_attention(KEPT, s, partials, heads)
    return settled(kept)[batch.mask], torch.cat(neurons, -1)


def _fit_for(layers: Sequence[nn.Linear | LinearRows], ridge: Ridge) -> RidgeFit | None:
    """Return the change of what `layers` read that they lose least with; None where it is no gain."""
    weights = torch.cat([layer.weight.double() for layer in layers])
    return ridge.best(weights.T @ weights)


def _put(layers: Sequence[nn.Linear | LinearRows], rows: Rows, fit: RidgeFit | None) -> dict | None:
    """Put a change of what is read into these rows of `layers`; return what the report says."""
    if fit is None:
        return None
    d = layers[0].in_features
    for layer, r in ((layer, r) for layer in layers for r in rows):
        w = layer.weight[r].double()
        if len(fit.change) > d and layer.bias is not None:
            layer.bias[r] += (w @ fit.change[d]).to(layer.bias.dtype)
        layer.weight[r] += (w @ fit.change[:d].T).to(layer.weight.dtype)
    return fit.detail()


def _add(layer: nn.Linear, fit: RidgeFit | None) -> dict | None:
    """Add a change to a layer, [in_features (+ 1), out_features]; return what the report says."""
    if fit is None:
        return None
    change = fit.change.to(layer.weight.dtype)
    layer.weight += change[: layer.in_features].T
    if layer.bias is not None:
        layer.bias += change[-1]  # type: ignore[misc]
    return fit.detail()


def _rows(student: Student, rank: int) -> Rows:
    """Return the rank's neurons, in a fused layer of gate and of up."""
    first = student.block.mlps[rank].mlp_in[0]  # type: ignore[index]
    assert isinstance(first, RankLinear)
    return first.rows


def _features(x: Tensor, constant: bool) -> Tensor:
    """Return x [N, p], with a column of ones behind it if `constant`: where there is a bias to put it into."""
    return torch.cat([x, x.new_ones(len(x), 1)], -1) if constant else x
