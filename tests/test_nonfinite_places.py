"""Where NaN or Inf is looked for: the places of a model in words, and what their outputs hold."""

import pytest
import tiny
import torch

from spd_calib.errors import InputError
from spd_calib.models.architecture import find_decoder
from spd_calib.models.probe import find_layers
from spd_calib.parallel import nonfinite
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.parallel.streams import Streams


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_places_of_the_dense_model_are_all_named(family):
    model = tiny.build(family)
    decoder, parts = find_decoder(model), find_layers(model)
    places = nonfinite.places_of_dense(model, model.lm_head, decoder=decoder, parts=parts)
    layers = model.model.layers
    expected = [("the embeddings", model.model.embed_tokens)]
    for i, layer in enumerate(layers):
        words = f"block {i} (model.layers.{i})"
        expected += [
            (f"{words}, attention", layer.self_attn),
            (f"{words}, MLP", layer.mlp.down_proj if family == "llama" else layer.mlp.experts),
            (f"{words}, the sum behind its MLP", layer),
        ]
    expected.append(("the output head", model.lm_head))
    assert [(p.words, p.rank) for p in places] == [(words, None) for words, _ in expected]
    assert all(p.module is module for p, (_, module) in zip(places, expected, strict=True))


def test_places_on_ranks_name_the_rank():
    lm = TensorParallelLM.simulated(tiny.build("llama"), 2)
    places = nonfinite.places_on_ranks(lm.model, lm.blocks, lm.module_paths, lm.head)
    expected: list = [("the embeddings", None)]
    for i in range(4):
        words = f"block {i} (model.layers.{i})"
        expected += [(f"{words}, {part}", rank) for part in ("attention", "MLP") for rank in (0, 1)]
        expected.append((f"{words}, the sum behind its MLP", None))
    assert [(p.words, p.rank) for p in places] == [*expected, ("the output head", None)]


def test_what_a_module_gives_is_looked_through():
    x, y, z = torch.ones(1), torch.ones(2), torch.ones(3)
    assert nonfinite._tensors((x, y)) == [x] and nonfinite._tensors([y]) == [y] and nonfinite._tensors(z)[0] is z
    streams = nonfinite._tensors(Streams(x, [y], [z]))
    assert [t.numel() for t in streams] == [1, 2, 3] and nonfinite._tensors(Streams(x)) == [x]
    assert nonfinite._tensors("no tensor") == [] and nonfinite._tensors((None, x)) == []


def test_a_mask_is_used_where_it_is_of_these_tokens(monkeypatch):
    """With a KV cache the mask also covers what came before, which is not run again."""
    lm = TensorParallelLM.simulated(tiny.build("llama"), 2)
    seen = []
    monkeypatch.setattr(TensorParallelLM, "__call__", lambda self, ids, mask=None: seen.append(mask))
    ids = tiny.tokens(1, 3)
    for mask, used in ((torch.ones(1, 3), True), (torch.ones(1, 7), False), (None, False)):
        with pytest.raises(InputError, match=r"^The logits hold NaN or Inf under this plan: it breaks the model"):
            lm.refuse_nonfinite(ids, mask)
        assert (seen.pop() is mask) if used else (seen.pop() is None)
