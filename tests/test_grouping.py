"""Which rank gets which heads and neurons: the dense function stays, costs and assignments are those by hand."""

import numpy as np
import pytest
import tiny
import torch
from planned_models import planned, sequences
from scipy.optimize import linear_sum_assignment

from spd_calib.models.architecture import HeadCounts
from spd_calib.models.probe import find_layers
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.recovery import neuron_grouping
from spd_calib.recovery.assignment import balanced, order_of
from spd_calib.recovery.feed import Feed
from spd_calib.recovery.head_grouping import placeable_units
from spd_calib.recovery.moments import output_gradient_moments
from spd_calib.recovery.permute import permute_heads, permute_neurons


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


def test_neuron_costs_are_the_formula() -> None:
    model = planned("starcoder2", tp=2, layers=1)
    student, feed = model.students[0], Feed(model, sequences(3), batch_size=2)
    costs = neuron_grouping.neuron_costs(student, feed, feed.batches)
    expected = np.zeros_like(costs)
    parts, block = student.parts, student.block
    for batch in feed.batches:
        partials, _ = block.attend(batch.planned, **batch.kwargs[0])
        right = batch.dense + sum(partials) + parts.o.bias
        for rank in range(2):
            wrong = batch.dense + partials[rank] + parts.o.bias
            act = [parts.activation(parts.mlp_in[0](parts.norm2(h))) for h in (wrong, right)]
            error = (act[0] - act[1]).detach().double().square().sum((0, 1))
            expected[rank] += (error * parts.down.weight.double().square().sum(0)).numpy()
    assert np.allclose(costs, expected, rtol=1e-5)


def test_the_gradients_moments_are_a_metric_at_every_block() -> None:
    model = planned(layers=2)
    feed = Feed(model, sequences(4), batch_size=4)
    found = output_gradient_moments(feed, feed.batches)
    assert len(found) == 2
    for f in found:
        assert torch.allclose(f, f.T) and torch.linalg.eigvalsh(f).min() > 0
        assert f.diagonal().mean().item() == pytest.approx(1)
