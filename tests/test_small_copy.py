"""The narrow model that stands for the real one before its weights are read."""

import pytest
import tiny
import torch

from spd_calib.errors import InputError
from spd_calib.parallel import small_copy
from spd_calib.parallel.small_copy import narrowed


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
    assert (narrowed(whole).num_key_value_heads, narrowed(shared).num_key_value_heads) == (2, 1)
    opt = tiny.build("opt").config
    opt.pad_token_id = 77
    assert narrowed(opt).pad_token_id == 0 and opt.pad_token_id == 77
    assert not hasattr(narrowed(opt), "num_key_value_heads")


def test_a_small_copy_of_blocks_that_differ():
    """Gemma 4's heads of 8 columns, in blocks 1 and 3 of 16; KV heads are shared (1) or as many as heads (RANKS)."""
    config = tiny.build("gemma4").config
    narrow = narrowed(config).to_dict()
    assert (narrow["num_attention_heads"], narrow["hidden_size"]) == (2, 2 * 8)
    for kv_heads, of_blocks, expected in ((4, 2, (1, 1)), (8, 2, (2, 1)), (4, 8, (1, 2)), (8, 8, (2, 2))):
        config.num_key_value_heads = kv_heads
        said = {"1": {"head_dim": 16, "num_key_value_heads": of_blocks}, "3": {"head_dim": 16}}
        config.per_layer_config = said
        narrow = narrowed(config).to_dict()
        own = narrow["per_layer_config"]["1"]
        found = narrow["num_key_value_heads"], own.get("num_key_value_heads", narrow["num_key_value_heads"])
        assert found == expected and own["head_dim"] == 16, (kv_heads, of_blocks)


@pytest.mark.parametrize("family", ["llama", "opt", "qwen3", "gemma", "qwen3_5", "qwen2_moe"])
def test_a_small_copy_is_narrow_and_otherwise_the_same(family):
    config = tiny.build(family).config
    before = config.to_dict()
    narrow = narrowed(config).to_dict()
    assert config.to_dict() == before, "the configuration itself stays as it is"
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    shared = (getattr(config, "num_key_value_heads", None) or heads) != heads
    width = 2 * head_dim
    expected = {
        "num_attention_heads": 2, "num_key_value_heads": 1 if shared else 2, "hidden_size": width,
        "word_embed_proj_dim": width, "intermediate_size": width, "ffn_dim": width, "vocab_size": 64, "pad_token_id": 0,
    }  # fmt: skip
    if family == "qwen3_5":
        a_key = config.linear_num_value_heads // config.linear_num_key_heads
        expected |= {"linear_num_key_heads": 2, "linear_num_value_heads": 2 * a_key}
    if family == "qwen2_moe":
        expected |= {"moe_intermediate_size": width, "shared_expert_intermediate_size": width}
        assert expected.keys() & before.keys() > {"moe_intermediate_size", "shared_expert_intermediate_size"}
    for name in before:
        assert narrow[name] == (expected[name] if name in expected else before[name]), name
    assert "num_hidden_layers" in narrow and "XX" not in "".join(vars(narrowed(config)))


@pytest.mark.parametrize(
    ("error", "words"), [(ValueError("no such value.\nmore"), "no such value"), (KeyError(), "KeyError")]
)
def test_what_a_forward_stumbles_over_is_said_in_one_line(error, words, monkeypatch):
    def stumble(config):
        raise error

    monkeypatch.setattr(small_copy, "_run", stumble)
    with pytest.raises(InputError) as e:
        small_copy.check_small_copy(tiny.build("llama").config)
    assert str(e.value) == (
        f"The configuration (llama) cannot be used: a small model of it does not run ({words}); correct its "
        "config.json, or fetch the model again."
    )


def test_positions_of_a_small_copy_are_bounded():
    config = tiny.build("llama").config
    config.max_position_embeddings = 2**20
    assert narrowed(config).max_position_embeddings == 2**17
    config.max_position_embeddings = 100
    assert narrowed(config).max_position_embeddings == 100
