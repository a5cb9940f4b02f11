"""A block on its ranks: what its MLPs read under predictors, and a KV cache for each rank."""

import pytest
import tiny
import torch
from predictors import KINDS, predictor
from transformers import DynamicCache

from spd_calib.errors import InputError
from spd_calib.formats.drops import NOTHING_DROPPED, Drop, Drops, Point, Strategy
from spd_calib.models.predictor import Predictor
from spd_calib.parallel.block import _a_cache_for_each_rank, _branch
from spd_calib.parallel.model import TensorParallelLM

DROP = Strategy.BLOCK_DROP
A0, A1 = Point(0, "attention"), Point(1, "attention")


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_the_mlp_reads_is_predicted(kind):
    """With values of zero attention gives nothing, so each rank's MLP reads x + bias, and the stream stays exact."""
    model = tiny.build("llama")
    layer, ids = model.model.layers[0], tiny.tokens(2, 6)
    with torch.no_grad():
        layer.self_attn.v_proj.weight.zero_()
    x = model.model.embed_tokens(ids)
    lm = TensorParallelLM.simulated(tiny.build("llama"), 2)
    for attention in lm.blocks[0].attentions:
        attention.v_proj.weight.data.zero_()
    c = predictor(kind, lm.blocks[0].d_rank, lm.blocks[0].width, 0)
    with lm.running(Drops({A0: Drop(DROP, {0: c, 1: c})})):
        predicted = lm.record(ids).streams[1].shared
    assert torch.allclose(predicted, x + layer.mlp(layer.post_attention_layernorm(x + c.bias)), atol=1e-5)
    exact = x + layer.mlp(layer.post_attention_layernorm(x))
    for drops in (NOTHING_DROPPED, Drops.of({A0: DROP})):  # of these nothing is predicted
        with lm.running(drops):
            assert torch.allclose(lm.record(ids).streams[1].shared, exact, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "llama_bias"])
def test_a_predictor_that_is_the_ranks_own_share_changes_nothing(family):
    lm, ids = TensorParallelLM.simulated(tiny.build(family), 2), tiny.tokens(2, 6)

    def logits(predictors=None):
        with lm.running(Drops({A0: Drop(DROP, predictors)})):
            return lm(ids)

    plain = logits()
    zero = torch.zeros(lm.blocks[0].width)
    o_proj = tiny.build(family).model.layers[0].self_attn.o_proj.weight
    shares = [o_proj[:, :32].T.detach().clone(), o_proj[:, 32:].T.detach().clone()]  # of 64 columns, by heads
    own = logits({r: Predictor(zero, w=w.clone()) for r, w in enumerate(shares)})
    assert torch.allclose(own, plain, atol=1e-5)
    a, b = torch.randn(lm.blocks[0].d_rank, 2), torch.randn(2, lm.blocks[0].width)
    low = logits({r: Predictor(zero, a=a, b=b) for r in (0, 1)})
    both = logits({r: Predictor(zero, w=w + a @ b) for r, w in enumerate(shares)})
    assert torch.allclose(both, low, atol=1e-4) and not torch.allclose(low, plain, atol=1e-3)


def test_a_scalar_is_in_the_bias_where_there_is_no_norm():
    """Behind a norm it multiplies what the norm gives."""
    bias = torch.tensor([3.0, 5.0])
    assert _branch(bias, None, 2.0).bias.tolist() == [6, 10] and _branch(bias, None, 1.0).bias is bias
    behind = _branch(bias, torch.nn.Identity(), 2.0)
    assert behind.bias is bias and behind(torch.ones(2)).tolist() == [8, 12]


def test_predictors_that_do_not_fit_are_refused():
    lm = TensorParallelLM.simulated(tiny.build("llama"), 2)
    block = lm.blocks[1]
    good = predictor("full", block.d_rank, block.width, 0)
    with (
        pytest.raises(InputError, match=r"^Block 1 has no predictor for rank 1 of 2\.$"),
        lm.running(Drops({A1: Drop(DROP, {0: good})})),
    ):
        pytest.fail("it runs")
    for wrong in (predictor("full", block.d_rank + 1, block.width, 0), predictor("mean", 1, block.width + 1, 0)):
        with pytest.raises(InputError) as e, lm.running(Drops({A1: Drop(DROP, {0: good, 1: wrong})})):
            pytest.fail("it runs")
        assert str(e.value) == "The compensation of block 1, rank 1, does not fit the model's heads and width."
    assert lm.fitted(Drops({A1: Drop(DROP, {1: good, 0: good})})).at(A1).predictors == {0: good, 1: good}


def test_every_rank_has_cache_layers_of_its_own_once():
    cache = DynamicCache(config=tiny.build("llama").config)
    assert len(cache.layers) == 4
    for _ in range(2):
        _a_cache_for_each_rank(cache, 4, 3)
        assert len(cache.layers) == 12 and len({id(layer) for layer in cache.layers}) == 12
    one = DynamicCache(config=tiny.build("llama").config)
    _a_cache_for_each_rank(one, 4, 1)
    assert len(one.layers) == 4
