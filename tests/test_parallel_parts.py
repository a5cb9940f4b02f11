"""Parts of parallel/ that a whole run hides: the words for places, a small copy, the head, caches, a group of one."""

import pytest
import tiny
import torch
import torch.distributed as dist
from torch import nn
from transformers import DynamicCache

from spd_calib.errors import InputError
from spd_calib.models.architecture import find_decoder
from spd_calib.models.probe import find_layers
from spd_calib.parallel import finite, session, small_copy
from spd_calib.parallel.block import _a_cache_for_each_rank
from spd_calib.parallel.comm import Distributed, Simulated
from spd_calib.parallel.compensation import Compensation, tensors_of
from spd_calib.parallel.model import TensorParallelLM, VocabParallelHead
from spd_calib.parallel.streams import Streams


def test_places_of_the_dense_model_are_all_named():
    model = tiny.build("llama")
    decoder, parts = find_decoder(model), find_layers(model)
    places = finite.places_of_dense(model, model.lm_head, decoder, parts)
    layers = model.model.layers
    expected = [("the embeddings", model.model.embed_tokens)]
    for i, layer in enumerate(layers):
        words = f"block {i} (model.layers.{i})"
        expected += [
            (f"{words}, attention", layer.self_attn),
            (f"{words}, MLP", layer.mlp.down_proj),
            (f"{words}, the sum behind its MLP", layer),
        ]
    expected.append(("the output head", model.lm_head))
    assert [(p.words, p.rank) for p in places] == [(words, None) for words, _ in expected]
    assert all(p.module is module for p, (_, module) in zip(places, expected, strict=True))


def test_places_on_ranks_name_the_rank():
    lm = TensorParallelLM.simulated(tiny.build("llama"), 2)
    found = [(p.words, p.rank) for p in finite._places_of(lm)]
    expected: list = [("the embeddings", None)]
    for i in range(4):
        words = f"block {i} (model.layers.{i})"
        expected += [(f"{words}, {part}", rank) for part in ("attention", "MLP") for rank in (0, 1)]
        expected.append((f"{words}, the sum behind its MLP", None))
    assert found == [*expected, ("the output head", None)]


def test_what_a_module_gives_is_looked_through():
    x, y, z = torch.ones(1), torch.ones(2), torch.ones(3)
    assert finite._tensors((x, y)) == [x] and finite._tensors([y]) == [y] and finite._tensors(z)[0] is z
    streams = finite._tensors(Streams(x, [y], [z]))
    assert [t.numel() for t in streams] == [1, 2, 3] and finite._tensors(Streams(x)) == [x]
    assert finite._tensors("no tensor") == [] and finite._tensors((None, x)) == []


def test_a_mask_is_used_where_it_is_of_these_tokens(monkeypatch):
    """With a KV cache the mask also covers what came before, which is not run again."""
    lm = TensorParallelLM.simulated(tiny.build("llama"), 2)
    seen = []
    monkeypatch.setattr(TensorParallelLM, "__call__", lambda self, ids, mask=None: seen.append(mask))
    ids = tiny.tokens(1, 3)
    for mask, used in ((torch.ones(1, 3), True), (torch.ones(1, 7), False), (None, False)):
        with pytest.raises(InputError, match=r"^The logits hold NaN or Inf under this plan: it breaks the model"):
            finite.refuse_not_finite(lm, ids, mask)
        assert (seen.pop() is mask) if used else (seen.pop() is None)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_small_copy_is_float32_with_random_biases_and_no_code_of_its_own(family, monkeypatch):
    config = tiny.build(family, **({"attention_bias": True} if family == "llama" else {})).config
    config.dtype = torch.float16
    asked, made = [], []
    real, real_lm = small_copy.AutoModelForCausalLM, small_copy.TensorParallelLM

    class Auto:
        @staticmethod
        def from_config(config, **options):
            asked.append(options)
            return real.from_config(config, **options)

    class LM:
        @staticmethod
        def simulated(model, ranks):
            made.append({name: p.detach().clone() for name, p in model.named_parameters()})
            return real_lm.simulated(model, ranks)

    monkeypatch.setattr(small_copy, "AutoModelForCausalLM", Auto)
    monkeypatch.setattr(small_copy, "TensorParallelLM", LM)
    before = torch.random.get_rng_state()
    for _ in range(2):
        small_copy.check_small_copy(config)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert asked == [{"dtype": torch.float32, "trust_remote_code": False}] * 2
    one, two = made
    assert all(torch.equal(p, two[name]) and p.dtype == torch.float32 for name, p in one.items())
    biases = torch.cat([p.flatten() for name, p in one.items() if name.endswith("bias")])
    assert 0.02 < biases.std() < 0.08 and biases.abs().max() < 0.5


def test_a_small_copy_shares_kv_heads_where_the_model_does():
    whole, shared = tiny.build("llama", num_key_value_heads=8).config, tiny.build("llama", num_key_value_heads=4).config
    assert (small_copy._narrow(whole).num_key_value_heads, small_copy._narrow(shared).num_key_value_heads) == (2, 1)
    opt = tiny.build("opt").config
    opt.pad_token_id = 77
    assert small_copy._narrow(opt).pad_token_id == 0 and opt.pad_token_id == 77
    assert not hasattr(small_copy._narrow(opt), "num_key_value_heads")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_cut_head_is_the_whole_head(ranks, bias):
    """A vocabulary of 10: parts of 10, 5, 4 and 3, the last shorter. Of streams that differ, each its own part."""
    head = nn.Linear(6, 10, bias=bias)
    cut = VocabParallelHead(head, Simulated(ranks))
    hidden = torch.randn(2, 5, 6)
    assert torch.allclose(cut(hidden), head(hidden), atol=1e-6) and cut(hidden).is_contiguous()
    streams = torch.randn(ranks, 2, 5, 6)
    cut.streams_differ = True
    width = -(-10 // ranks)
    expected = torch.cat([head(s)[..., r * width : (r + 1) * width] for r, s in enumerate(streams)], -1)
    assert torch.allclose(cut(streams.flatten(0, 1)), expected, atol=1e-6)


def test_every_rank_has_cache_layers_of_its_own_once():
    cache = DynamicCache(config=tiny.build("llama").config)
    assert len(cache.layers) == 4
    for _ in range(2):
        _a_cache_for_each_rank(cache, 4, 3)
        assert len(cache.layers) == 12 and len({id(layer) for layer in cache.layers}) == 12
    one = DynamicCache(config=tiny.build("llama").config)
    _a_cache_for_each_rank(one, 4, 1)
    assert len(one.layers) == 4


def test_predictors_are_written_in_float32():
    bias, a, b = torch.randn(4), torch.randn(3, 2), torch.randn(2, 4)
    c = Compensation(bias.bfloat16(), a.bfloat16(), b.bfloat16())
    found = tensors_of(7, {1: c})
    assert len(found) == 3 and all(t.dtype == torch.float32 and t.is_contiguous() for t in found.values())


def test_one_real_rank_sums_alone(tmp_path):
    """A group of one: what is reduced is its own, in a tensor of its own, and counted."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        comm = Distributed()
        for limit in (0, 2**15):
            comm.gathered_at_most = limit
            own = torch.randn(4, 3).T
            total = comm.all_reduce([own])
            assert torch.equal(total, own) and total.data_ptr() != own.data_ptr() and total.is_contiguous()
        assert comm.all_reduces == 2
        part = torch.randn(2, 3, 4)
        assert torch.equal(comm.all_gather([part]), part)
    finally:
        dist.destroy_process_group()


def test_the_revision_that_a_file_names_is_looked_for(llama, monkeypatch):
    asked, real = [], session.locate
    monkeypatch.setattr(session, "locate", lambda model, revision: asked.append(revision) or real(model, revision))
    opened = session.open_session(str(llama), 2)
    expected = opened.ref.model_copy(update={"revision": "abc"})
    session.open_session(str(llama), 2, expected)
    assert asked == [None, "abc"] and session.versions()["spd_calib"]
    torch.manual_seed(5)
    opened.load()
    first = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(first, torch.rand(1))  # seed 0 unless told otherwise
