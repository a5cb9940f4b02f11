"""Simulated ranks against the independent reference and the dense model, on every supported family."""

import ast
import itertools
from collections.abc import Mapping
from pathlib import Path

import pytest
import reference
import tiny
import torch
from predictors import predictor

import spd_calib
from spd_calib.errors import InputError
from spd_calib.formats.drops import NOTHING_DROPPED, Drop, Drops, Point, Strategy
from spd_calib.models.architecture import find_decoder
from spd_calib.models.layer_names import LAYERS
from spd_calib.models.probe import find_layers
from spd_calib.parallel.head import PerRank
from spd_calib.parallel.model import TensorParallelLM, tolerance

KEEP, DROP, PLAIN = Strategy.KEEP_SYNC, Strategy.BLOCK_DROP, Strategy.PLAIN_DROP
ATTENTION = {
    "keep": (KEEP,) * 4,
    "block_drop": (DROP,) * 4,
    "plain_drop": (PLAIN,) * 4,
    "mixed": (KEEP, PLAIN, DROP, PLAIN),
    "mixed2": (DROP, KEEP, PLAIN, DROP),
}
MLP = {"kept": (KEEP,) * 4, "deferred": (DROP, DROP, KEEP, KEEP), "some": (DROP, KEEP, DROP, KEEP)}
MIXED = Drops.of_blocks(ATTENTION["mixed"], MLP["some"])


def words(strategies) -> list[str]:
    return [str(s) for s in strategies]


@pytest.mark.parametrize("tp", [2, 4, 8])
@pytest.mark.parametrize("family", tiny.SUPPORTED)
def test_every_mixture_equals_the_reference(family, tp):
    dense = tiny.build(family)
    lm = TensorParallelLM.simulated(tiny.build(family).double(), tp)  # some machines round float32 by as much as 1e-5
    ids = tiny.tokens(2, 12)
    for (a, attention), (m, mlp) in itertools.product(ATTENTION.items(), MLP.items()):
        if m != "kept" and a in ("plain_drop", "mixed2"):
            continue  # time
        with lm.running(Drops.of_blocks(attention, mlp)):
            found = lm(ids)
        expected = reference.logits(dense, ids, tp, words(attention), words(mlp))
        assert (found - expected).abs().max() < 1e-5, (a, m)
    lm, (padded, mask) = TensorParallelLM.simulated(tiny.build(family), tp), tiny.left_padded(ids, [0, 3])
    expected = reference.logits(dense, padded, tp, words(attention), words(mlp), attention_mask=mask)
    with lm.running(Drops.of_blocks(attention, mlp)):
        found = lm.model(padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    assert ((found - expected).abs().amax(-1) * mask).max() < 1e-5


def test_branches_through_a_norm_and_a_scalar_equal_the_reference():
    dense, ids = tiny.build("hyperclovax", **tiny.NORMS_AND_SCALE), tiny.tokens(2, 10)
    lm = TensorParallelLM.simulated(tiny.build("hyperclovax", **tiny.NORMS_AND_SCALE), 4)
    for attention, mlp in (("keep", "kept"), ("mixed", "some"), ("block_drop", "deferred")):
        with lm.running(Drops.of_blocks(ATTENTION[attention], MLP[mlp])):
            found = lm(ids)
        expected = reference.logits(dense, ids, 4, words(ATTENTION[attention]), words(MLP[mlp]))
        assert (found - expected).abs().max() < 1e-5, attention


@pytest.mark.parametrize("family", tiny.SUPPORTED)
def test_generate_with_a_cache_equals_recomputing(family):
    dense = tiny.build(family)
    lm = TensorParallelLM.simulated(tiny.build(family), 4)
    ids, mask = tiny.left_padded(tiny.tokens(2, 8), [0, 3])
    lm.model.generation_config.eos_token_id = None
    with lm.running(MIXED):
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


@pytest.mark.parametrize("kept", [1, 3])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_logits_of_the_last_positions_are_those_of_all(family, kept):
    """transformers cuts the hidden states before the head; those that differ from rank to rank stay apart."""
    lm, ids = TensorParallelLM.simulated(tiny.build(family), 4), tiny.tokens(2, 12)
    for drops in (MIXED, NOTHING_DROPPED):
        with lm.running(drops):
            last = lm.model(ids, logits_to_keep=kept, use_cache=False).logits
            assert last.shape[1] == kept and torch.allclose(last, lm(ids)[:, -kept:], atol=1e-6)
    with lm.running(MIXED):
        assert isinstance(lm.record(ids).final, PerRank)


@pytest.mark.parametrize("family", ["llama_bias", "opt"])
def test_resuming_from_any_block_equals_the_whole_forward(family):
    lm = TensorParallelLM.simulated(tiny.build(family), 4)
    ids = tiny.tokens(3, 10)
    with lm.running(Drops.of_blocks((DROP, KEEP, KEEP, KEEP), (DROP, KEEP, KEEP, KEEP))):  # block 1: with a debt
        recording = lm.record(ids)
    assert recording.streams[1].debt is not None
    for attention, mlp in (
        ((DROP, PLAIN, DROP, KEEP), (DROP, KEEP, DROP, KEEP)),  # resumed from block 1
        ((DROP, KEEP, DROP, PLAIN), (DROP, KEEP, KEEP, KEEP)),  # from block 2
        ((DROP, KEEP, KEEP, DROP), (DROP, KEEP, KEEP, KEEP)),  # from block 3
        ((KEEP, KEEP, KEEP, KEEP), (DROP, KEEP, KEEP, KEEP)),  # from block 0: dropped in the recording, kept now
    ):
        drops = Drops.of_blocks(attention, mlp)
        resumed = lm.logits(lm.resume(recording, drops))
        with lm.running(drops):
            assert torch.equal(resumed, lm(ids))
    assert torch.equal(lm.logits(lm.record(ids).final), lm(ids))


def test_resuming_runs_the_blocks_from_the_first_that_differs():
    lm, ids = TensorParallelLM.simulated(tiny.build("llama"), 2), tiny.tokens(2, 6)
    recorded = Drops.of({Point(1, "attention"): DROP})
    with lm.running(recorded):
        recording = lm.record(ids)
    ran = []
    for block in lm.blocks:
        block.read_weights = lambda index: ran.append(index)
    for more, first in (({Point(2, "mlp"): DROP}, 2), ({Point(0, "attention"): PLAIN}, 0), ({}, 4)):
        ran.clear()
        final = lm.resume(recording, recorded | Drops.of(more))
        assert sorted(set(ran)) == list(range(first, 4)), more
    assert final is recording.final


def test_bfloat16_ranks_share_one_stream_and_stay_near_the_dense_model():
    dense = tiny.build("llama").to(torch.bfloat16)
    lm = TensorParallelLM.simulated(tiny.build("llama").to(torch.bfloat16), 4)
    ids = tiny.tokens(2, 16)
    assert (lm(ids).float() - dense(ids).logits.float()).abs().max() < 0.1
    with lm.running(Drops.of_blocks(ATTENTION["block_drop"])):
        assert lm(ids).dtype == torch.bfloat16


@pytest.mark.parametrize(("name", "cause"), [(n, c) for n, c in tiny.REFUSED.items()])
def test_refused_architectures_name_the_cause(name, cause):
    with pytest.raises(InputError) as e:
        TensorParallelLM.simulated(tiny.build_refused(name), 2)
    assert all(word.lower() in str(e.value).lower() for word in cause), str(e.value)
    assert "\n" not in str(e.value)


def test_the_rows_name_the_classes_that_are_tested_and_no_others():
    """Each in the row that its layers are found by."""
    rows = {name: row for row in LAYERS.values() if row.experts is None for name in row.classes}
    tested = {type(model).__name__: model for model in map(tiny.build, tiny.SUPPORTED)}
    assert set(rows) == set(tested)
    for name, model in tested.items():
        parts = find_layers(model)[0]
        layer = find_decoder(model).layers[0]
        for norm in ("norm1", "attention_out_norm", "norm2", "mlp_out_norm"):
            path = getattr(rows[name], norm)
            found = layer.get_submodule(path) if path else torch.nn.Identity()
            assert isinstance(found, torch.nn.Identity) or getattr(parts, norm) is found
        assert parts.names is rows[name]
        assert [id(m) for m in parts.mlp_in] == [id(layer.get_submodule(path)) for path in rows[name].mlp_in]
        assert bool(rows[name].scale) == (parts.scale != 1.0)


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


def replaced(model, block: int, forward) -> None:
    """Have one block of `model` run `forward(layer, hidden_states, **kwargs)` in place of its own."""
    layer = model.model.layers[block]
    layer.forward = forward.__get__(layer)


def test_a_branch_scaled_otherwise_than_the_layer_says_is_refused():
    def mlp_unscaled(self, hidden_states, **kwargs):
        h = hidden_states + 0.4 * self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
        return h + self.mlp(self.post_attention_layernorm(h))

    def attention_unscaled(self, hidden_states, **kwargs):
        h = hidden_states + self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
        return h + 0.4 * self.mlp(self.post_attention_layernorm(h))

    def scaled(self, hidden_states, **kwargs):
        h = hidden_states + 0.4 * self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
        return h + 0.4 * self.mlp(self.post_attention_layernorm(h))

    for family, forward, cause in (
        ("granite", mlp_unscaled, "Block 2 .*something else"),
        ("granite", attention_unscaled, "Block 2 .*is scaled \\(by 1, not 0.4\\)"),
        ("llama", scaled, "Block 2 .*is scaled \\(by 0.4, not 1\\)"),
    ):
        model = tiny.build(family)
        replaced(model, 2, forward)
        with pytest.raises(InputError, match=cause):
            TensorParallelLM.simulated(model, 2)


def test_fused_layers_that_lie_otherwise_are_refused():
    """Up before the gate is found by the probe; q and k in each other's place, only by all ranks together."""
    model = tiny.build("phi3")
    mlp = model.model.layers[1].mlp

    def up_first(u):
        up, gate = mlp.gate_up_proj(u).chunk(2, dim=-1)
        return mlp.down_proj(up * mlp.activation_fn(gate))

    mlp.forward = up_first
    with pytest.raises(InputError, match="Block 1"):
        TensorParallelLM.simulated(model, 2)

    model = tiny.build("phi3", kv_heads=8)
    qkv = model.model.layers[1].self_attn.qkv_proj
    qkv.register_forward_hook(lambda m, args, out: out.view(*out.shape[:-1], 8, 3, 8).transpose(-3, -2).flatten(-3))
    with pytest.raises(InputError, match="differs"):
        TensorParallelLM.simulated(model, 2)


def test_a_model_without_an_output_head_is_refused(monkeypatch):
    model = tiny.build("llama")
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    with pytest.raises(InputError, match=r"^LlamaForCausalLM has no plain output head; "):
        TensorParallelLM.simulated(model, 2)


def test_how_far_rounding_may_go():
    for value, dtype, expected in ((0.5, torch.float32, 1e-4), (-20.0, torch.float32, 2e-3), (20.0, torch.bfloat16, 2)):
        assert tolerance(torch.tensor([value, 0.1], dtype=dtype)) == pytest.approx(expected)


def test_what_stands_behind_the_output_head_counts_for_measured_logits_too():
    """Granite divides its logits; logits that are made from a recording are divided as well."""
    lm, ids = TensorParallelLM.simulated(tiny.build("granite"), 2), tiny.tokens(2, 6)
    assert torch.equal(lm.logits(lm.record(ids).final), lm(ids))
    lm.model.config.logits_scaling = 3.0
    assert not torch.allclose(lm.logits(lm.record(ids).final), lm(ids), atol=1e-3)
    model = tiny.build("llama")
    model.config.logits_scaling = 2.0  # which Llama knows nothing of
    with pytest.raises(InputError, match="differs"):
        TensorParallelLM.simulated(model, 2)


@pytest.fixture
def small() -> tuple[TensorParallelLM, torch.Tensor]:
    """A Llama on two ranks, and tokens for it."""
    return TensorParallelLM.simulated(tiny.build("llama"), 2), tiny.tokens(2, 6)


def test_the_last_mlp_sync_point_cannot_be_deferred(small):
    lm, _ = small
    for drops in (Drops.of_blocks((KEEP,) * 4, (KEEP, KEEP, KEEP, DROP)), Drops.of_blocks((DROP,) * 5)):
        with pytest.raises(ValueError, match="in a model of 4 blocks"), lm.running(drops):
            pytest.fail("it runs")
        with pytest.raises(ValueError, match="in a model of 4 blocks"):
            lm.resume(lm.record(tiny.tokens(1, 4)), drops)


def test_outside_the_model_is_dense(small):
    lm, ids = small
    dense = lm(ids)
    with torch.no_grad():
        assert torch.allclose(dense, tiny.build("llama")(ids).logits, atol=1e-5)
    with lm.running(MIXED):
        dropped = lm(ids)
    assert not torch.allclose(dropped, dense, atol=1e-3)
    assert torch.equal(lm(ids), dense)
    recording = lm.record(ids)
    assert recording.drops == NOTHING_DROPPED
    assert torch.equal(lm.logits(lm.resume(recording, MIXED)), dropped)
    assert torch.equal(lm(ids), dense), "resume leaves nothing behind"


def test_within_another_the_innermost_counts_alone(small):
    lm, ids = small
    one, other = Drops.of_blocks((DROP, KEEP, KEEP, KEEP)), Drops.of_blocks((KEEP, PLAIN, KEEP, KEEP))

    def logits(drops):
        with lm.running(drops):
            return lm(ids)

    alone, both = [logits(one), logits(other)], logits(one | other)
    assert not torch.allclose(alone[1], both, atol=1e-4)
    with lm.running(one):
        assert torch.equal(logits(other), alone[1]) and torch.equal(lm(ids), alone[0])
        with lm.running(NOTHING_DROPPED):
            dense = lm(ids)
        assert torch.equal(lm(ids), alone[0])
    assert torch.equal(lm(ids), dense)


def test_an_error_within_leaves_the_model_as_before(small):
    lm, ids = small
    dense = lm(ids)
    outer = Drops.of_blocks((DROP, KEEP, KEEP, KEEP))
    with lm.running(outer):
        expected = lm(ids)
        with pytest.raises(RuntimeError, match="my own"), lm.running(MIXED):
            raise RuntimeError("my own")
        assert torch.equal(lm(ids), expected)
        with (
            pytest.raises(InputError, match="no predictor"),
            lm.running(Drops({Point(0, "attention"): Drop(DROP, {})})),
        ):
            pytest.fail("it runs")
        assert torch.equal(lm(ids), expected)
    assert torch.equal(lm(ids), dense)


@pytest.mark.parametrize("kind", ["mean", "low_rank", "full"])
def test_predictors_run_in_the_models_dtype_and_those_given_stay_as_they_are(kind):
    lm, ids = TensorParallelLM.simulated(tiny.build("llama").to(torch.bfloat16), 2), tiny.tokens(2, 6)
    given = {r: predictor(kind, lm.blocks[0].d_rank, lm.blocks[0].width, r) for r in (0, 1)}
    before = {r: {name: p.clone() for name, p in c.named_parameters()} for r, c in given.items()}
    drops = Drops({Point(0, "attention"): Drop(DROP, given)})
    ran = lm.fitted(drops).at(Point(0, "attention")).predictors
    assert {p.dtype for c in ran.values() for p in c.parameters()} == {torch.bfloat16}
    with lm.running(drops):
        assert lm(ids).dtype == torch.bfloat16
        recording = lm.record(ids)
    assert lm.resume(recording, recording.drops) is recording.final
    assert drops.at(Point(0, "attention")).predictors == given
    for r, c in given.items():
        for name, p in c.named_parameters():
            assert p.dtype == torch.float32 and torch.equal(p, before[r][name])


def test_running_is_the_one_door():
    """Nothing in the package sets what a model runs but TensorParallelLM.running itself."""
    package, places = Path(spd_calib.__file__).parent, []
    names = {"drops", "present", "attention_strategy", "mlp_strategy", "compensation", "predictors", "strategies"}
    for file in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in itertools.chain.from_iterable(t.elts if isinstance(t, ast.Tuple) else [t] for t in targets):
                on_itself = isinstance(getattr(target, "value", None), ast.Name) and target.value.id == "self"
                if isinstance(target, ast.Attribute) and target.attr in names and not on_itself:
                    places.append((file.relative_to(package).as_posix(), ast.unparse(target)))
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setattr" and len(node.args) == 3:
                assert getattr(node.args[1], "value", None) not in names, (file, node.lineno)
    assert places == [("parallel/model.py", "self._present.drops")] * 2


@pytest.mark.parametrize("family", tiny.SUPPORTED)
def test_what_enters_is_what_a_recording_holds(family):
    """And no block is run for it; afterwards every forward is as before."""
    lm, ids = TensorParallelLM.simulated(tiny.build(family), 2), tiny.tokens(2, 12)
    recording, ran = lm.record(ids), []
    hooks = [block.norm1.register_forward_hook(lambda *_: ran.append(1)) for block in lm.blocks]
    x, kwargs = lm.enter(ids)
    assert not ran and torch.equal(x, recording.streams[0].shared)
    for hook in hooks:
        hook.remove()
    assert torch.equal(lm.record(ids).final, recording.final)
    for given, recorded in zip(kwargs, recording.kwargs, strict=True):
        assert given.keys() == recorded.keys()
        for name in given:
            if not isinstance(given[name], Mapping):  # which Gemma 4's blocks fill as they run
                torch.testing.assert_close(given[name], recorded[name], rtol=0, atol=0)
