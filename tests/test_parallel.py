"""Simulated ranks against the independent reference and the dense model, on every supported family."""

import itertools

import pytest
import reference
import tiny
import torch

from spd_calib.errors import InputError
from spd_calib.formats.common import Strategy
from spd_calib.parallel.model import TensorParallelLM

KEEP, DROP, PLAIN = Strategy.KEEP_SYNC, Strategy.BLOCK_DROP, Strategy.PLAIN_DROP
ATTENTION = {
    "keep": (KEEP,) * 4,
    "block_drop": (DROP,) * 4,
    "plain_drop": (PLAIN,) * 4,
    "mixed": (KEEP, PLAIN, DROP, PLAIN),
    "mixed2": (DROP, KEEP, PLAIN, DROP),
}
MLP = {"kept": (KEEP,) * 4, "deferred": (DROP, DROP, KEEP, KEEP), "some": (DROP, KEEP, DROP, KEEP)}


def words(strategies) -> list[str]:
    return [str(s) for s in strategies]


@pytest.mark.parametrize("tp", [2, 4, 8])
@pytest.mark.parametrize("family", tiny.SUPPORTED)
def test_every_mixture_equals_the_reference(family, tp):
    dense = tiny.build(family)
    lm = TensorParallelLM.simulated(tiny.build(family), tp)
    ids = tiny.tokens(2, 12)
    padded, mask = tiny.left_padded(ids, [0, 3])
    for (a, attention), (m, mlp) in itertools.product(ATTENTION.items(), MLP.items()):
        if m != "kept" and a in ("plain_drop", "mixed2"):
            continue  # time
        lm.set_strategies(attention, mlp)
        expected = reference.logits(dense, ids, tp, words(attention), words(mlp))
        assert (lm(ids) - expected).abs().max() < 1e-5, (a, m)
    lm.set_strategies(attention, mlp)
    expected = reference.logits(dense, padded, tp, words(attention), words(mlp), attention_mask=mask)
    found = lm.model(padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    assert ((found - expected).abs().amax(-1) * mask).max() < 1e-5


@pytest.mark.parametrize("family", tiny.SUPPORTED)
def test_generate_with_a_cache_equals_recomputing(family):
    dense = tiny.build(family)
    lm = TensorParallelLM.simulated(tiny.build(family), 4)
    lm.set_strategies(ATTENTION["mixed"], MLP["some"])
    ids, mask = tiny.left_padded(tiny.tokens(2, 8), [0, 3])
    lm.model.generation_config.eos_token_id = None
    found = lm.model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
    expected = reference.generate(
        dense, ids, 4, words(ATTENTION["mixed"]), 12, mlp_strategies=words(MLP["some"]), attention_mask=mask
    )
    assert torch.equal(found, expected)


def test_beam_search_reorders_the_caches_of_all_ranks():
    lm = TensorParallelLM.simulated(tiny.build("llama"), 4)
    dense = tiny.build("llama")
    ids = tiny.tokens(2, 8)
    for model in (lm.model, dense):
        model.generation_config.eos_token_id = None
    arguments = {"max_new_tokens": 10, "num_beams": 3, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(lm.model.generate(ids, **arguments), dense.generate(ids, **arguments))


@pytest.mark.parametrize("family", ["llama_bias", "opt"])
def test_resuming_from_any_block_equals_the_whole_forward(family):
    lm = TensorParallelLM.simulated(tiny.build(family), 4)
    ids = tiny.tokens(3, 10)
    lm.set_strategies((DROP, KEEP, KEEP, KEEP), (DROP, KEEP, KEEP, KEEP))  # block 1 is entered with a debt
    recording = lm.record(ids)
    lm.set_strategies((DROP, PLAIN, DROP, KEEP), (DROP, KEEP, DROP, KEEP))
    for first in range(1, 4):
        if first == 1:
            assert torch.equal(lm.logits(lm.resume(recording, first)), lm(ids))
    assert recording.streams[1].debt is not None
    lm.keep_all()
    assert torch.equal(lm.logits(lm.record(ids).final), lm(ids))


def test_bfloat16_ranks_share_one_stream_and_stay_near_the_dense_model():
    dense = tiny.build("llama").to(torch.bfloat16)
    lm = TensorParallelLM.simulated(tiny.build("llama").to(torch.bfloat16), 4)
    ids = tiny.tokens(2, 16)
    assert (lm(ids).float() - dense(ids).logits.float()).abs().max() < 0.1
    lm.set_strategies(ATTENTION["block_drop"])
    assert lm(ids).dtype == torch.bfloat16


@pytest.mark.parametrize(("name", "cause"), [(n, c) for n, c in tiny.REFUSED.items()])
def test_refused_architectures_name_the_cause(name, cause):
    with pytest.raises(InputError) as e:
        TensorParallelLM.simulated(tiny.build_refused(name), 2)
    assert all(word.lower() in str(e.value).lower() for word in cause), str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(("tp", "word"), [(3, "8 query heads"), (16, "8 query heads"), (0, "number of ranks")])
def test_a_degree_that_does_not_divide_is_refused(tp, word):
    with pytest.raises(InputError, match=word):
        TensorParallelLM.simulated(tiny.build("llama"), tp)


def test_neurons_and_kv_heads_must_divide():
    with pytest.raises(InputError, match="124 MLP neurons"):
        TensorParallelLM.simulated(tiny.build("llama", intermediate=124), 8)
    with pytest.raises(InputError, match="6 KV heads"):
        TensorParallelLM.simulated(tiny.build("llama", heads=12, kv_heads=6, hidden=96), 4)


def test_a_llama_in_name_that_computes_something_else_is_refused():
    """The probe asks the layer, not its name: a doubled attention branch in one block is found."""
    model = tiny.build("llama")
    attention = model.model.layers[2].self_attn
    forward = type(model.model.layers[2]).forward

    def doubled(self, hidden_states, **kwargs):
        once = forward(self, hidden_states, **kwargs)
        return once + attention(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]

    model.model.layers[2].forward = doubled.__get__(model.model.layers[2])
    with pytest.raises(InputError, match="Block 2"):
        TensorParallelLM.simulated(model, 2)


def test_the_last_mlp_sync_point_cannot_be_deferred():
    lm = TensorParallelLM.simulated(tiny.build("llama"), 2)
    with pytest.raises(ValueError, match="last one is kept"):
        lm.set_strategies((KEEP,) * 4, (KEEP, KEEP, KEEP, DROP))
