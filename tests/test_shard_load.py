"""What one rank reads from disk: its slices of the dense weights and no more. No process group is needed for that."""

import json

import pytest
import tiny
import torch
from owned import owned
from safetensors.torch import load_file, save_file

from spd_calib.errors import InputError
from spd_calib.models.architecture import HeadCounts
from spd_calib.models.load import load_dense, locate, read_config
from spd_calib.models.probe import find_layers
from spd_calib.models.shard import RankSlices, linear_slices, vocabulary_slice
from spd_calib.models.shard_load import load_sharded, own_slices
from spd_calib.parallel.small_copy import check_small_copy


def load(folder, rank=1, tp=4, dtype="float32"):
    source = locate(str(folder))
    return load_sharded(source, read_config(source), rank=rank, tp=tp, device="cpu", dtype=dtype)


@pytest.mark.parametrize("family", tiny.SUPPORTED)
@pytest.mark.parametrize("tp", [2, 4])
def test_a_rank_holds_its_slices_of_the_dense_weights(family, tp, tmp_path):
    dense = tiny.build(family)
    tiny.save(dense, tmp_path)
    tied = dense.config.tie_word_embeddings
    for rank in range(tp):
        model = load(tmp_path, rank, tp)
        own = own_slices(model, rank=rank, tp=tp)
        state = dense.state_dict()
        for name, parameter in model.named_parameters():
            whole = state[name]
            assert torch.equal(parameter, owned(whole, *own.get(name, ()))), name
        for parts in find_layers(dense):  # the table that cuts is the one that the simulation views through
            slices = RankSlices.of(HeadCounts.of(parts), rank, tp)
            assert len(linear_slices(parts, slices)) == len(parts.linears) - len(parts.latents)
        for name, buffer in dense.named_buffers():
            assert torch.equal(model.get_buffer(name), buffer), name
        head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
        assert (head is embedding) == tied
        rows = vocabulary_slice(131, rank=rank, tp=tp)
        assert len(head) == (131 if tied else rows.stop - rows.start)


def test_the_ranks_of_more_ranks_than_kv_heads_share_them(tmp_path):
    tiny.save(tiny.build("llama"), tmp_path)
    one, other = (load(tmp_path, rank, 8).model.layers[0].self_attn for rank in (0, 3))
    assert one.k_proj.weight.shape == (8, 64)
    assert torch.equal(one.k_proj.weight, other.k_proj.weight)
    assert not torch.equal(one.q_proj.weight, other.q_proj.weight)


@pytest.mark.parametrize(("stored", "asked"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_weights_are_converted_as_they_are_read(stored, asked, tmp_path):
    tiny.save(tiny.build("llama").to(getattr(torch, stored)), tmp_path)
    dense = load_dense(locate(str(tmp_path)), read_config(locate(str(tmp_path))), device="cpu", dtype=asked)
    model = load(tmp_path, dtype=asked)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, asked)}
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, dense.model.layers[1].mlp.up_proj.weight[32:64])
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize("family", ["qwen3", "opt"])
def test_a_checkpoint_of_the_bare_decoder_lacks_the_prefix(family, tmp_path):
    """Both have their head tied to the embedding."""
    dense = tiny.build(family, tie_word_embeddings=True)
    tiny.save(dense, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({name.removeprefix("model."): t for name, t in tensors.items()}, tmp_path / "model.safetensors")
    model = load(tmp_path)
    assert torch.equal(model.get_output_embeddings().weight, dense.get_output_embeddings().weight)
    own = own_slices(model, rank=1, tp=4)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, owned(dense.state_dict()[name], *own.get(name, ())))


def test_no_more_vocabulary_than_ranks(tmp_path):
    tiny.save(tiny.build("llama", vocab=9), tmp_path, words=["a"])
    assert [len(load(tmp_path, rank, 4).lm_head.weight) for rank in range(4)] == [3, 3, 3, 0]


def test_a_missing_weight_and_one_of_another_shape_are_named(tmp_path):
    tiny.save(tiny.build("llama"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    lost = tensors.pop("model.layers.2.mlp.up_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"lack model\.layers\.2\.mlp\.up_proj\.weight"):
        load(tmp_path)
    save_file({**tensors, "model.layers.2.mlp.up_proj.weight": lost[:64].contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="the folder mixes two models"):
        load(tmp_path)


@pytest.mark.parametrize("family", tiny.SUPPORTED)
def test_a_small_copy_of_what_is_supported_is_accepted(family):
    state = torch.random.get_rng_state()
    check_small_copy(tiny.build(family).config)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("architecture", sorted(set(tiny.REFUSED) - {"diffllama", "gemma4_inputs", "gemma4_shared"}))
def test_a_small_copy_of_what_is_refused_is_refused(architecture):
    with pytest.raises(InputError) as refusal:
        check_small_copy(tiny.build_refused(architecture).config)
    assert any(word in str(refusal.value) for word in tiny.REFUSED[architecture]), refusal.value


def test_what_generation_config_says_is_read(tmp_path):
    tiny.save(tiny.build("llama"), tmp_path)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": 77}))
    assert load(tmp_path).generation_config.eos_token_id == 77
