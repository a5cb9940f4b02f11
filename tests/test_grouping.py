"""Which rank gets which heads and neurons: the dense function stays, costs and assignments are those by hand."""

import numpy as np
import pytest
import tiny
import torch
from planned_models import planned, sequences
from scipy.optimize import linear_sum_assignment

from spd_calib.formats.drops import Drops
from spd_calib.models.architecture import HeadCounts
from spd_calib.models.probe import find_layers
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.recovery import neuron_grouping
from spd_calib.recovery.assignment import balanced, order_of
from spd_calib.recovery.error_cost import PRIOR, QUANTILES, ErrorCost, error_costs
from spd_calib.recovery.feed import Feed
from spd_calib.recovery.head_grouping import placeable_units
from spd_calib.recovery.permute import permute_heads, permute_neurons
from spd_calib.recovery.planned_model import PlannedModel
from spd_calib.recovery.ridge import RidgeFit


@pytest.mark.parametrize("family", tiny.SUPPORTED)
@pytest.mark.parametrize("tp", [2, 8])
def test_grouping_leaves_the_dense_function_alone(family: str, tp: int) -> None:
    model, ids = tiny.build(family, layers=2), tiny.tokens(2, 12)
    with torch.no_grad():
        before = model(ids).logits
        for parts in find_layers(model):
            counts = HeadCounts.of(parts)
            units, cells = placeable_units(counts, tp)
            rng = np.random.default_rng(0)
            shuffled = [m for members, _ in cells for m in rng.permutation(members)]
            heads = torch.tensor([h for u in shuffled for h in units[u]])
            permute_heads(parts, counts, heads)
            permute_neurons(parts, torch.from_numpy(rng.permutation(counts.neurons)))
        assert (model(ids).logits - before).abs().max() < 1e-5
        ranks = TensorParallelLM.simulated(model, tp)
        assert (ranks(ids) - before).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "deepseek_v2"])
def test_sinks_and_what_lies_behind_latents_follow_their_heads(family: str) -> None:
    model, ids = tiny.build(family, layers=2), tiny.tokens(2, 12)
    with torch.no_grad():
        before = model(ids).logits
        for parts in find_layers(model):
            counts = HeadCounts.of(parts)
            group = counts.heads // counts.kv_heads
            kv = torch.arange(counts.kv_heads).flip(0)
            heads = (kv[:, None] * group + torch.arange(group).flip(0)).flatten()
            weight = parts.by_head[0].weight.clone()
            permute_heads(parts, counts, heads)
            assert not torch.equal(parts.by_head[0].weight, weight)
        assert (model(ids).logits - before).abs().max() < 1e-5
        assert (TensorParallelLM.simulated(model, 4)(ids) - before).abs().max() < 1e-4


def test_heads_of_one_kv_head_are_not_torn_apart() -> None:
    parts = find_layers(tiny.build("llama", layers=1))[0]
    with pytest.raises(ValueError, match="torn apart"):
        permute_heads(parts, HeadCounts.of(parts), torch.tensor([0, 4, 1, 2, 3, 5, 6, 7]))


@pytest.mark.parametrize(("ranks", "n"), [(2, 10), (4, 64), (8, 256)])
def test_the_assignment_is_balanced_and_as_cheap_as_scipys(ranks: int, n: int) -> None:
    rng = np.random.default_rng(ranks)
    for cost in (rng.random((ranks, n)), rng.lognormal(0, 2, (ranks, n)), np.ones((ranks, n)), -rng.random((ranks, n))):
        owner = balanced(cost)
        assert (np.bincount(owner, minlength=ranks) == n // ranks).all()
        wide = np.repeat(cost, n // ranks, 0)
        least = wide[linear_sum_assignment(wide)].sum()
        assert cost[owner, np.arange(n)].sum() == pytest.approx(least, rel=1e-12)
        assert sorted(order_of(owner, ranks)) == list(range(n))


def test_swapping_neurons_finds_errors_that_cancel() -> None:
    rng = np.random.default_rng(0)
    ranks, n = 2, 6
    x = rng.normal(size=(ranks * n, 40))
    gram = x @ x.T
    owner = balanced(np.diagonal(gram).reshape(ranks, n))

    def total(o: np.ndarray) -> float:
        return float(x[o * n + np.arange(n)].sum(0) @ x[o * n + np.arange(n)].sum(0))

    found = neuron_grouping.swap_neurons(gram, owner)
    assert (np.bincount(found) == n // ranks).all() and total(found) <= total(owner) + 1e-9
    for i in range(n):
        for j in range(n):
            swapped = found.copy()
            swapped[[i, j]] = swapped[[j, i]]
            assert total(swapped) >= total(found) - 1e-6


@pytest.mark.parametrize("refitted", [False, True])
def test_neuron_costs_are_the_formula(refitted: bool) -> None:
    model = planned("starcoder2", tp=2, layers=1)
    student, feed = model.students[0], Feed(model, sequences(3), batch_size=2)
    parts, block, d = student.parts, student.block, student.block.width
    generator, fits, cost = torch.Generator().manual_seed(0), None, None
    if refitted:
        fits = [RidgeFit(torch.randn(d + 1, d, generator=generator) / d, 0.0, 0.0), None]
        sizes, typical = torch.tensor([1.0, 2.0, 3.0]), torch.tensor(2.0)
        cost = ErrorCost(torch.diag(torch.arange(1.0, d + 1)), torch.zeros(1), sizes, typical)
    costs = neuron_grouping.neuron_costs(student, feed, feed.batches, cost=cost, fits=fits)
    expected = np.zeros_like(costs)
    for batch in feed.batches:
        partials, _ = block.attend(batch.planned, **batch.kwargs[0])
        right = parts.norm2(batch.dense + sum(partials) + parts.o.bias)
        weights = torch.ones(batch.mask.shape)
        if refitted:  # all norms are above the edge; that of a share of |y| is bounded far above
            weights[:, 0] = 1.5
        for rank in range(2):
            wrong = parts.norm2(batch.dense + partials[rank] + parts.o.bias)
            if fits is not None and fits[rank] is not None:
                wrong = wrong + wrong @ fits[rank].change[:d] + fits[rank].change[d]
            act = [parts.activation(parts.mlp_in[0](u)) for u in (wrong, right)]
            error = ((act[0] - act[1]).detach().double().square() * weights[..., None])[batch.mask].sum(0)
            lengths = parts.down.weight.double().square()
            if cost is not None:
                lengths = lengths * torch.arange(1.0, d + 1)[:, None]
            expected[rank] += (error * lengths.sum(0)).numpy()
    assert np.allclose(costs, expected, rtol=1e-5)


def test_tokens_weigh_what_an_error_there_costs() -> None:
    """Against gradients at transformers' own layers, on the same drawn tokens, averaged class by class."""
    dense, ids, seed = tiny.build("llama", layers=2), sequences(6), 3
    outputs: list[torch.Tensor] = []

    def hold(_: torch.nn.Module, args: tuple, out: torch.Tensor) -> None:
        out.retain_grad()
        outputs.append(out)

    hooks = [layer.register_forward_hook(hold) for layer in dense.model.layers]
    generator, found = torch.Generator().manual_seed(seed), [list[tuple[float, float, bool]]() for _ in range(2)]
    for text in ids:
        outputs.clear()
        logits = dense(torch.tensor([text]), use_cache=False).logits[0]
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
        for rows, y in zip(found, outputs, strict=True):
            for t in range(len(text)):
                rows.append((y[0, t].square().mean().sqrt().item(), y.grad[0, t].square().sum().item(), t == 0))
    for hook in hooks:
        hook.remove()
    model = PlannedModel(dense, 2, Drops())
    feed, of_first = Feed(model, ids, batch_size=1), len(ids[0])
    for block, (cost, rows) in enumerate(zip(error_costs(feed, feed.batches, seed=seed), found, strict=True)):
        later = [norm for norm, _, first in rows[:of_first] if not first]
        edges = np.quantile(later, QUANTILES)
        assert np.allclose(cost.edges, edges, rtol=1e-4)
        mean = np.mean([g for _, g, _ in rows])
        of_class = [len(edges) + 1 if first else int((edges < norm).sum()) for norm, _, first in rows]
        sizes = []
        for c in range(len(edges) + 2):
            own = [g for (_, g, _), k in zip(rows, of_class, strict=True) if k == c]
            sizes.append((sum(own) + PRIOR * mean) / (len(own) + PRIOR))
        squares = np.array([norm**2 for norm, _, _ in rows])
        relative = np.array([sizes[c] for c in of_class]) * squares
        expected = np.minimum(relative / np.sort(relative)[(len(rows) - 1) // 2], 64) / squares
        feed.move_to(block)
        weights = [cost.token_weights(feed.dense_output(batch), batch.mask) for batch in feed.batches]
        assert np.allclose(torch.cat(weights), expected, rtol=1e-3)


def test_the_direction_of_the_error_cost_is_a_metric_at_every_block() -> None:
    model = planned(layers=2)
    feed = Feed(model, sequences(4), batch_size=4)
    found = error_costs(feed, feed.batches)
    assert len(found) == 2
    for f in (cost.direction for cost in found):
        assert torch.allclose(f, f.T) and torch.linalg.eigvalsh(f).min() > 0
        assert f.diagonal().mean().item() == pytest.approx(1)
