"""Which tensors make a model: sound folders of every form load in every loader, any other is refused by all alike."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from owned import owned
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from spd_calib.errors import InputError
from spd_calib.models.load import checked_fingerprint, load_dense, locate, read_config
from spd_calib.models.shard_load import load_sharded, own_slices
from spd_calib.models.stream_load import load_streamed
from spd_calib.parallel.generate import continue_text
from spd_calib.parallel.session import open_session

Tensors = dict[str, Tensor]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHORT = ("--data", "{text}", "--seq-len", 16, "--max-samples", 4, "--verify-samples", 2, "--device", "cpu")


def weights(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Write the tensors of a folder anew, changed."""
    changed = {k: v.clone().contiguous() for k, v in change(load_file(folder / SINGLE)).items()}
    save_file(changed, folder / SINGLE, metadata={"format": "pt"})


def configure(folder: Path, **values) -> None:
    """Set fields of a folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def make(folder: Path, family: str = "llama", shards: bool = False, **overrides) -> Path:
    """A sound folder of 3 blocks."""
    model = tiny.build(family, **{"layers": 3, **overrides})
    tiny.save(model, folder)
    if shards:
        (folder / SINGLE).unlink()
        model.save_pretrained(folder, max_shard_size="100KB")
    return folder


def refusals(folder: Path) -> set[str]:
    """The sentences by which each of the loaders, and the fingerprint, refuse a folder."""
    source = locate(str(folder))
    config = read_config(source)
    found = set()
    for load in (
        lambda: load_dense(source, config, device="cpu", dtype="float32"),
        lambda: load_streamed(source, config, device="cpu", dtype="float32"),
        lambda: load_sharded(source, config, rank=1, tp=2, device="cpu", dtype="float32"),
        lambda: checked_fingerprint(source, config),
    ):
        with pytest.raises(InputError) as refusal:
            load()
        found.add(str(refusal.value))
    return found


def logits(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """What a model in memory gives for these tokens."""
    with torch.no_grad():
        return model(input_ids=ids).logits


def check_sound(folder: Path, dtype: str = "float32") -> None:
    """Every loader takes the folder, and has transformers' own numbers."""
    source, ids = locate(str(folder)), tiny.tokens(2, 12)
    config = read_config(source)
    capped = getattr(config, "attn_logit_softcapping", None) is not None  # which its sdpa leaves out
    attention = {"attn_implementation": "eager"} if capped else {}
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **attention).eval()
    assert torch.equal(logits(load_dense(source, config, device="cpu", dtype=dtype), ids), logits(expected, ids))
    streamed = open_session(str(folder), 2).load(dtype=dtype, stream=True)
    assert (streamed(ids).float() - logits(expected, ids).float()).abs().max() < (1e-5 if dtype == "float32" else 0.1)
    whole = expected.state_dict()
    for rank in range(2):
        model = load_sharded(source, config, rank=rank, tp=2, device="cpu", dtype=dtype)
        own = own_slices(model, rank=rank, tp=2)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, owned(whole[name], *own.get(name, ()))), name


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "an index"])
@pytest.mark.parametrize("family", tiny.SUPPORTED)
def test_every_family_loads_as_transformers_loads_it(family, shards, tmp_path):
    check_sound(make(tmp_path, family, shards))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "gemma", "opt"])
def test_half_precision_too(family, dtype, tmp_path):
    tiny.save(tiny.build(family).to(getattr(torch, dtype)), tmp_path)
    check_sound(tmp_path, dtype)


def spelled(change: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {change(name): tensor for name, tensor in tensors.items()}


HARMLESS = {
    "without the prefix": ("qwen3", spelled(lambda n: n.removeprefix("model."))),
    "OPT without the prefix": ("opt", spelled(lambda n: n.removeprefix("model."))),
    "the prefix twice": ("llama", spelled(lambda n: n if n == "lm_head.weight" else f"model.{n}")),
    "a tied copy": ("qwen3", lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"]}),
    "the copy alone": (
        "qwen3",
        spelled(lambda n: "lm_head.weight" if n == "model.embed_tokens.weight" else n),
    ),
    "rotary frequencies of each block": (
        "llama",
        lambda t: {**t, **{f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(3)}},
    ),
    "norms in another kind of number": (
        "llama",
        lambda t: {n: w.bfloat16() if "norm" in n else w.double() if "head" in n else w for n, w in t.items()},
    ),
    "OPT with its tied copy": ("opt", lambda t: {**t, "lm_head.weight": t["model.decoder.embed_tokens.weight"]}),
}


@pytest.mark.parametrize("what", HARMLESS)
def test_what_changes_nothing_is_taken(what, tmp_path):
    family, change = HARMLESS[what]
    weights(make(tmp_path, family), change)
    check_sound(tmp_path)


def quantised(tensors: Tensors) -> Tensors:
    """float8 with scales beside it."""
    found = {}
    for name, t in tensors.items():
        scale = t.abs().max() / 448
        inner = t.dim() == 2 and "layers" in name
        found[name] = (t / scale).to(torch.float8_e4m3fn) if inner else t
        found |= {name.replace(".weight", ".weight_scale"): scale.reshape(1)} if inner else {}
    return found


def without(*parts: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n: t for n, t in tensors.items() if not any(part in n for part in parts)}


def also(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: torch.ones(shape, dtype=dtype)}


UP = "model.layers.1.mlp.up_proj.weight"
WEIGHTS = {
    "no head": (without("lm_head"), r"lack lm_head.weight of the 30 .* tie_word_embeddings is false"),
    "a bare decoder": (
        lambda t: spelled(lambda n: n.removeprefix("model."))(without("lm_head")(t)),
        "lack lm_head.weight",
    ),
    "attention pruned": (without("layers.1.self_attn"), "q_proj.weight and 3 more .* block 1 holds no attention"),
    "a block gone": (without("layers.1."), "nothing of block 1"),
    "the last block gone": (without("layers.2."), "num_hidden_layers 3, and the weights hold 2 blocks"),
    "one tensor gone": (without(UP), f"lack {UP} of the 30"),
    "compiled": (spelled(lambda n: f"_orig_mod.{n}"), r"embed_tokens.weight and 29 more .* '_orig_mod.'"),
    "data parallel": (spelled(lambda n: f"module.{n}"), "'module.'"),
    "sharded training": (spelled(lambda n: n.replace("layers.", "_fsdp_wrapped_module.layers.")), "_fsdp_wrapped"),
    "an adapter's base": (spelled(lambda n: f"base_model.model.{n}"), "'base_model.model.'"),
    "an adapter": (also("model.layers.0.self_attn.q_proj.lora_A.weight", 2, 64), "adapter"),
    "biases": (also("model.layers.0.self_attn.q_proj.bias", 64), "switches these biases off"),
    "a block more": (also("model.layers.3.mlp.up_proj.weight", 128, 64), "of block 3, .* num_hidden_layers 3"),
    "something else": (also("vision.weight", 3), "vision.weight, which the model of its configuration does not read"),
    "float8 and scales": (quantised, "F8_E4M3"),
    "scales alone": (also("model.layers.0.mlp.up_proj.weight_scale", 1), "quantised"),
    "whole numbers": (lambda t: {**t, UP: (100 * t[UP]).to(torch.int8)}, f"{UP} as I8"),
    "packed in place of a weight": (
        lambda t: {**without(UP)(t), UP.replace("weight", "qweight"): torch.ones(64, 16)},
        f"lack {UP} .* quantised",
    ),
    "another shape": (lambda t: {**t, UP: t[UP][:64]}, "the folder mixes two models"),
    "twice under two names": (lambda t: {**t, "norm.weight": t["model.norm.weight"]}, "hold model.norm.weight twice"),
}


@pytest.mark.parametrize("what", WEIGHTS)
def test_other_weights_are_refused_by_all_alike(what, tmp_path):
    change, words = WEIGHTS[what]
    weights(make(tmp_path), change)
    (said,) = refusals(tmp_path)
    assert re.search(words, said) and said.endswith(".") and "\n" not in said


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_hidden_layers": 4}, "weights hold 3 blocks"),
        ({"num_hidden_layers": 2}, "of block 2, and the configuration says num_hidden_layers 2"),
        ({"tie_word_embeddings": True}, "with different values"),
        ({"attention_bias": True}, "q_proj.bias and 11 more"),
        ({"intermediate_size": 64}, "has the shape"),
        ({"vocab_size": 130}, "has the shape"),
    ],
)
def test_another_configuration_is_refused_by_all_alike(values, words, tmp_path):
    configure(make(tmp_path), **values)
    (said,) = refusals(tmp_path)
    assert words in said


def lose(folder: Path, name: str, in_index: bool, in_file: bool) -> None:
    """Remove a tensor from the index, from its file, or from both."""
    index = json.loads((folder / INDEX).read_text())
    file = folder / index["weight_map"][name]
    if in_file:
        kept = {n: t for n, t in load_file(file).items() if n != name}
        save_file(kept, file, metadata={"format": "pt"})
    if in_index:
        del index["weight_map"][name]
        (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("in_index", "in_file", "words"),
    [(True, True, "no weight file holds it"), (False, True, "which it does not"), (True, False, "does not name")],
)
def test_an_index_with_a_hole_is_refused(in_index, in_file, words, tmp_path):
    lose(make(tmp_path, shards=True), UP, in_index, in_file)
    (said,) = refusals(tmp_path)
    assert UP in said and words in said


def test_a_stale_file_beside_an_index_is_refused(tmp_path):
    folder = make(tmp_path / "a", shards=True)
    shutil.copy(make(tmp_path / "b") / SINGLE, folder)
    (said,) = refusals(folder)
    assert f"{SINGLE} beside the files that {INDEX} names" in said


def test_a_stale_part_beside_a_single_file_is_refused(tmp_path):
    folder = make(tmp_path)
    shutil.copy(folder / SINGLE, folder / "model-00001-of-00002.safetensors")
    assert "00001-of-00002.safetensors beside model.safetensors" in next(iter(refusals(folder)))
    (folder / SINGLE).unlink()
    assert "no model.safetensors.index.json" in next(iter(refusals(folder)))


def test_an_index_of_the_single_file_is_taken(tmp_path):
    folder = make(tmp_path)
    names = dict.fromkeys(load_file(folder / SINGLE), SINGLE)
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    check_sound(folder)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    folder = make(tmp_path, shards=True)
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: tensor}, second, metadata={"format": "pt"})
    (said,) = refusals(folder)
    assert f"holds {name} twice, in {first.name} and in {second.name}" in said


@pytest.mark.parametrize("index", ["[]", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', "{", '{"weight_map": [1]}'])
def test_junk_as_an_index_is_refused(index, tmp_path):
    folder = make(tmp_path, shards=True)
    (folder / INDEX).write_text(index)
    (said,) = refusals(folder)
    assert "cannot be read as an index" in said


def test_weights_that_overflow_in_the_dtype_asked_for_are_refused_by_all_alike(tmp_path):
    weights(make(tmp_path), lambda t: {**t, UP: 1e6 * t[UP]})
    source = locate(str(tmp_path))
    config = read_config(source)
    with pytest.raises(InputError, match=f"block 1, {UP}"):
        load_dense(source, config, device="cpu", dtype="float16")
    with pytest.raises(InputError, match=f"block 1, {UP}"):
        load_sharded(source, config, rank=0, tp=2, device="cpu", dtype="float16")
    _, blocks = load_streamed(source, config, device="cpu", dtype="float16")
    with pytest.raises(InputError, match=f"block 1, {UP}"):
        blocks.hold(1)
    load_dense(source, config, device="cpu", dtype="bfloat16")


MULTIMODAL = {
    "text_config": {"text_config": {"hidden_size": 64}},
    "vision_config": {"vision_config": {"hidden_size": 64}},
    "encoder and decoder": {"is_encoder_decoder": True},
}


@pytest.mark.parametrize("what", MULTIMODAL)
def test_a_model_of_several_parts_is_refused(what, tmp_path):
    configure(make(tmp_path), **MULTIMODAL[what])
    with pytest.raises(InputError, match="not supported"):
        open_session(str(tmp_path), 2)


def test_a_configuration_of_text_and_sound_is_refused(tmp_path):
    from transformers import AutoConfig

    AutoConfig.for_model("qwen2_audio").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="a model of several parts"):
        open_session(str(tmp_path), 2)


def test_opt_with_a_projection_is_refused(tmp_path):
    make(tmp_path, "opt", word_embed_proj_dim=32)
    with pytest.raises(InputError, match=r"has a projection .*word_embed_proj_dim 32, hidden_size 64"):
        open_session(str(tmp_path), 2)


def test_token_ids_beyond_the_embedding_are_refused_where_they_are_used(tmp_path):
    session = open_session(str(make(tmp_path)), 2)
    for lm in (session.load(), session.load(stream=True)):
        ids = torch.tensor([[5, 130, 6]])
        assert lm(ids).isfinite().all()
        for wrong in (131, -1):
            with pytest.raises(InputError, match=f"token id {wrong}, and the model's embedding has rows 0 to 130"):
                lm(torch.tensor([[5, wrong, 6]]))


def test_the_commands_say_it_in_one_sentence_and_write_nothing(spd, text, tmp_path):
    """One case of each kind; all of them are above, by function."""
    cases = tmp_path / "cases"
    weights(make(cases / "no_head"), without("lm_head"))
    weights(make(cases / "loud"), lambda t: {**t, "lm_head.weight": 1e5 * t["lm_head.weight"]})
    added = make(cases / "added")
    tokenizer = tiny.tokenizer([*tiny.WORDS, *(f"w{i}" for i in range(60))])
    tokenizer.save_pretrained(added)
    words = tiny.write_jsonl(tmp_path / "beyond.jsonl", [f"{w} " + "w50 w51 w52 w53 " * 5 for w in tiny.WORDS[:40]])
    for name, data, said in (
        ("no_head", text, "lack lm_head.weight"),
        ("loud", text, "nats a token"),
        ("added", words, "token id"),
    ):
        for more in ([], ["--stream"]):
            out = tmp_path / "out"
            out.mkdir()
            options = [str(o).format(text=data) for o in SHORT]
            outcome = spd("profile", cases / name, "--tp", 2, *options, "-o", out / "p.json", *more)
            assert outcome.code == 2 and said in outcome.err, outcome.err
            assert outcome.err.count("spd-calib: ") == 1 and outcome.out == ""
            assert list(out.iterdir()) == []
            out.rmdir()
    assert (
        spd("profile", added, "--tp", 2, *(str(o).format(text=text) for o in SHORT), "-o", cases / "p.json").code == 0
    )


def text_of(folder: Path, stream: bool = False) -> str:
    session = open_session(str(folder), 2)
    return continue_text(session.load(stream=stream), session.tokenizer, prompt="the cat", new_tokens=6)


def generation(folder: Path, **values) -> Path:
    """Set fields of a folder's generation_config.json."""
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


SET_ASIDE = {
    "penalty_alpha": 0.6,
    "return_dict_in_generate": True,
    "num_return_sequences": 3,
    "num_beams": 4,
    "dola_layers": "high",
    "prompt_lookup_num_tokens": 3,
    "cache_implementation": "quantized",
    "stop_strings": ["a"],
    "guidance_scale": 2.0,
    "output_scores": True,
    "constraints": 3,
}


def test_what_asks_for_another_search_is_set_aside(tmp_path):
    expected = text_of(make(tmp_path))
    generation(tmp_path, **SET_ASIDE)
    assert text_of(tmp_path) == text_of(tmp_path, stream=True) == expected
    for name in SET_ASIDE:
        assert getattr(open_session(str(tmp_path), 2).load().model.generation_config, name) in (None, False)


def test_what_shapes_the_tokens_is_kept(tmp_path):
    dense = AutoModelForCausalLM.from_pretrained(generation(make(tmp_path), repetition_penalty=2, bad_words_ids=[[5]]))
    ids = tiny.tokenizer()("the cat", return_tensors="pt")["input_ids"]
    dense.generation_config.repetition_penalty = 2.0
    expected = dense.generate(ids, max_new_tokens=6, do_sample=False)[0]
    assert text_of(tmp_path) == text_of(tmp_path, stream=True) == tiny.tokenizer().decode(expected, True)


@pytest.mark.parametrize(
    "values",
    [
        {"top_k": -1},
        {"temperature": "warm"},
        {"repetition_penalty": 0},
        {"eos_token_id": "x"},
        {"bad_words_ids": [[999]]},
    ],
    ids=str,
)
def test_what_no_text_can_be_generated_by_is_refused(values, tmp_path):
    (said,) = refusals(generation(make(tmp_path), **values))
    assert next(iter(values)) in said and "correct it, or remove that line" in said


def test_junk_as_a_generation_config_is_refused(tmp_path):
    (make(tmp_path) / "generation_config.json").write_text("[1]")
    (said,) = refusals(tmp_path)
    assert "is no JSON object" in said
