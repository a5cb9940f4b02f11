"""Hypothesis on model folders: one thing changed, and every loader has transformers' own numbers or refuses.

Where transformers loads a folder with a warning, or fills in what is missing, there is no right number: all loaders
have to refuse it, in the same words.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from owned import owned
from safetensors.torch import load_file, save_file
from test_hypothesis import JSON, places
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from spd_calib.errors import InputError
from spd_calib.models.load import check_config, checked_fingerprint, load_dense, load_tokenizer, locate, read_config
from spd_calib.models.shard_load import load_sharded, own_slices
from spd_calib.models.stream_load import load_streamed
from spd_calib.parallel.comm import SimulatedComm
from spd_calib.parallel.generate import continue_text
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.parallel.session import open_session
from spd_calib.parallel.small_copy import check_small_copy

# FUZZ_EXAMPLES: how many a test; make fuzz sets it
FUZZ = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "12")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
IDS = tiny.tokens(2, 9)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FOLDERS: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {}),
    "llama_bias": ("llama_bias", {}),
    "llama3_rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "mistral_window": ("mistral_window", {}),
    "qwen3": ("qwen3", {}),
    "gemma": ("gemma", {}),
    "opt": ("opt", {}),
    "starcoder2": ("starcoder2", {}),
    "arcee": ("arcee", {}),
}
KINDS = ("F64", "F16", "BF16", "F8", "I8", "I32", "BOOL")
DTYPES = dict(
    zip(
        KINDS,
        (torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.int32, torch.bool),
        strict=True,
    )
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> dict[str, Path]:
    """A folder of two blocks for each of FOLDERS, one of them in several files."""
    root = tmp_path_factory.mktemp("sound")
    made = {}
    for name, (family, extra) in FOLDERS.items():
        model = tiny.build(family, layers=2, **extra)
        made[name] = tiny.save(model, root / name)
        if name == "arcee":
            (made[name] / SINGLE).unlink()
            model.save_pretrained(made[name], max_shard_size="100KB")
    return made


@contextmanager
def warnings_of_transformers() -> Iterator[list[str]]:
    """What transformers' loggers warn of."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_warning()
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        transformers_logging.set_verbosity(before)


def reference(folder: Path) -> tuple[torch.nn.Module, list[str]]:
    """transformers' own model, and what it found wrong with the folder."""
    with warnings_of_transformers() as said:
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    wrong = [f"{what}: {names}" for what, names in info.items() if names]
    return model.eval(), wrong + [s for s in said if not re.search("generation|[bep]os_token_id|pad_token_id", s)]


def one_line(e: InputError) -> str:
    """The sentence of a refusal."""
    said = str(e)
    assert said.endswith((".", ")")) and len(said.splitlines()) == 1, said
    return said


@torch.no_grad()
def check_folder(folder: Path) -> bool:
    """Every loader refuses in the same words (False), or all have the numbers of a warning-free transformers (True)."""
    try:
        source = locate(str(folder))
        config = read_config(source)
        check_config(config, 2)
    except InputError as e:
        one_line(e)
        return False
    made, refused = {}, set()
    for name, load in (
        ("dense", lambda: load_dense(source, config, device="cpu", dtype="float32")),
        ("streamed", lambda: load_streamed(source, config, device="cpu", dtype="float32")),
        ("rank 0", lambda: load_sharded(source, config, rank=0, tp=2, device="cpu", dtype="float32")),
        ("rank 1", lambda: load_sharded(source, config, rank=1, tp=2, device="cpu", dtype="float32")),
        ("fingerprint", lambda: checked_fingerprint(source, config)),
    ):
        try:
            made[name] = load()
        except InputError as e:
            refused.add(one_line(e))
    made.pop("fingerprint", None)  # of what is stored: it computes nothing, and so refuses less
    assert not (made and refused) and len(refused) <= 1, (refused, list(made))
    try:
        check_small_copy(config)  # as a session does, once the tensors have shown that its sizes are real
    except InputError as e:
        refused.add(one_line(e))
    if refused:
        return False
    model, wrong = reference(folder)
    assert wrong == []
    expected = model(input_ids=IDS).logits
    assert same(made["dense"](input_ids=IDS).logits, expected)
    check_ranks(made, model)
    skeleton, blocks = made["streamed"]
    lm = TensorParallelLM(skeleton, SimulatedComm(2), sharded=True)
    lm.read_blocks_by(blocks.hold)
    assert same(lm(IDS), expected, 1e-4)
    return True


def check_ranks(made: dict, model: torch.nn.Module) -> None:
    """Ranks hold their slices of the dense weights, and its buffers, under the same configuration."""
    whole = model.state_dict()
    for rank in (0, 1):
        own = own_slices(made[f"rank {rank}"], rank=rank, tp=2)
        for name, parameter in made[f"rank {rank}"].named_parameters():
            assert torch.equal(parameter, owned(whole[name], *own.get(name, ()))), name
        for name, buffer in model.named_buffers():
            assert same(made[f"rank {rank}"].get_buffer(name), buffer, 0), name


def same(a: Tensor, b: Tensor, tolerance: float = 1e-6) -> bool:
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("name", FOLDERS)
def test_sound_folders_are_taken(sound, name):
    assert check_folder(sound[name])


def read_all(folder: Path) -> dict[Path, dict[str, Tensor]]:
    return {file: load_file(file) for file in sorted(folder.glob("*.safetensors"))}


def names_like(name: str) -> st.SearchStrategy[str]:
    """Names near the one given, and of kinds that real checkpoints have."""
    block = re.sub(r"layers\.(\d)", lambda m: f"layers.{int(m[1]) + 1}", name)
    stem, _, last = name.rpartition(".")
    near = [
        f"model.{name}", name.removeprefix("model."), f"_orig_mod.{name}", f"module.{name}", f"transformer.{name}",
        f"modelX{name}", block, f"{stem}.bias", f"{stem}.weight_scale", f"{stem}.rotary_emb.inv_freq",
        f"{stem}.{last}.weight", "lm_head.weight", "lm_head.bias", "model.embed_tokens.weight", "model.norm.weight",
        "model.rotary_emb.inv_freq", "rotary_emb.inv_freq", "position_ids", f"{stem}.LayerNorm.gamma",
        "model.decoder.final_layer_norm.beta", "decoder.embed_tokens.weight", f"{stem}.weight_g", stem, "x",
    ]  # fmt: skip
    return st.sampled_from(near) | st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)


@FUZZ
@given(data=st.data())
def test_one_tensor_changed(sound, tmp_path, data):
    """Deleted, renamed, added or retyped."""
    folder = tmp_path / "m"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sound[data.draw(st.sampled_from(sorted(FOLDERS)))], folder)
    files = read_all(folder)
    file = data.draw(st.sampled_from(sorted(files)))
    tensors = files[file]
    name = data.draw(st.sampled_from(sorted(tensors)))
    how = data.draw(st.sampled_from(["delete", "rename", "add", "copy", "retype", "reshape"]))
    if how in ("delete", "rename"):
        tensor = tensors.pop(name)
    if how == "rename":
        tensors[data.draw(names_like(name))] = tensor
    elif how == "add":
        like = tensors[name]
        tensors[data.draw(names_like(name))] = torch.randn(like.shape) + 1
    elif how == "copy":
        tensors[data.draw(names_like(name))] = tensors[name].clone()
    elif how == "retype":
        tensors[name] = tensors[name].to(DTYPES[data.draw(st.sampled_from(KINDS))])
    elif how == "reshape":
        cut = data.draw(st.sampled_from(["transposed", "shorter", "flat"]))
        t = tensors[name]
        tensors[name] = {"transposed": t.T if t.dim() == 2 else t, "shorter": t[:-1], "flat": t.flatten()}[cut].clone()
    save_file({n: t.contiguous() for n, t in tensors.items()}, file, metadata={"format": "pt"})
    if (folder / INDEX).exists() and data.draw(st.booleans()):
        index = {"metadata": {}, "weight_map": {n: f.name for f, of_file in files.items() for n in of_file}}
        (folder / INDEX).write_text(json.dumps(index))
    check_folder(folder)


def numbers_near(value: float) -> st.SearchStrategy:
    """Numbers that a hand, a conversion or a fuzzer puts in the place of one."""
    near = [value + 1, value - 1, value * 2, value // 2 if isinstance(value, int) else value / 2, -value, 0, 1, 2, 3]
    return st.sampled_from(near) | st.integers(-3, 200) | st.floats(-10, 10) | st.sampled_from([10**9, 1e-30, 1e30])


@FUZZ
@given(data=st.data())
def test_one_number_of_the_configuration_changed(sound, tmp_path, data):
    folder = tmp_path / "m"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sound[data.draw(st.sampled_from(sorted(FOLDERS)))], folder)
    config = json.loads((folder / "config.json").read_text())
    numbers = []
    for place in places(config):
        value = config
        for step in place:
            value = value[step]
        if isinstance(value, int | float) and not isinstance(value, bool):
            numbers.append((place, value))
    (*outer, key), value = data.draw(st.sampled_from(numbers))
    part = config
    for step in outer:
        part = part[step]
    part[key] = data.draw(numbers_near(value))
    (folder / "config.json").write_text(json.dumps(config))
    check_folder(folder)


@pytest.mark.parametrize(
    ("name", "key"), [("arcee", "intermediate_size"), ("llama", "intermediate_size"), ("opt", "ffn_dim")]
)
def test_mlps_without_a_neuron_are_refused(sound, tmp_path, name, key):
    folder = tmp_path / "m"
    shutil.copytree(sound[name], folder)
    config = json.loads((folder / "config.json").read_text())
    assert config[key]
    (folder / "config.json").write_text(json.dumps(config | {key: 0}))
    with pytest.raises(InputError, match="0 neurons"):
        open_session(str(folder), 2)
    assert not check_folder(folder)


def run(folder: Path) -> None:
    """Open the folder and use it, as the commands do."""
    session = open_session(str(folder), 2)
    load_tokenizer(session.source)
    for stream in (False, True):
        lm = session.load(stream=stream)
        assert lm(IDS).shape == (2, 9, session.config.vocab_size)
        continue_text(lm, session.tokenizer, prompt="the cat saw", new_tokens=3, temperature=0.7)
        continue_text(lm, session.tokenizer, prompt="a", new_tokens=2)


@pytest.mark.filterwarnings("ignore")
@FUZZ
@given(data=st.data())
@pytest.mark.parametrize(
    "file", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", INDEX, SINGLE]
)
def test_a_folder_with_one_file_changed_is_used_or_refused(sound, tmp_path, file, data):
    """Nothing unforeseen: an InputError of one line, or a model that runs."""
    folder = tmp_path / "m"
    shutil.rmtree(folder, ignore_errors=True)
    names = ["arcee"] if file == INDEX else ["llama", "qwen3", "opt", "starcoder2"]
    shutil.copytree(sound[data.draw(st.sampled_from(names))], folder)
    path = folder / file
    how = data.draw(st.sampled_from(["bytes", "a value", "a value", "a value", "a key"]))
    content = path.read_bytes()
    if how == "bytes" or file == SINGLE:
        at = data.draw(st.integers(0, min(len(content), 3000) - 1))
        piece = data.draw(st.binary(max_size=8) | st.sampled_from([b"", b"0", b'"', b"F16", b"I8", b"}"]))
        path.write_bytes(content[:at] + piece + content[at + data.draw(st.integers(0, 8)) :])
    else:
        document = json.loads(content)
        *outer, key = data.draw(st.sampled_from(list(places(document))))
        part = document
        for step in outer:
            part = part[step]
        if how == "a value":
            part[key] = data.draw(JSON | st.sampled_from([0, 1, 2, True, False, None, "auto", [], {}]))
        elif isinstance(part, dict):
            part[data.draw(st.sampled_from(MORE) | st.text(max_size=8))] = data.draw(JSON)
        path.write_text(json.dumps(document))
    try:
        run(folder)
    except InputError as e:
        one_line(e)


MORE = (
    "text_config", "vision_config", "return_dict", "output_attentions", "output_hidden_states", "use_cache",
    "is_decoder", "torchscript", "rope_scaling", "rope_parameters", "layer_types", "sliding_window", "head_dim",
    "pruned_heads", "quantization_config", "auto_map", "tie_word_embeddings", "penalty_alpha", "num_beams",
    "num_return_sequences", "return_dict_in_generate", "top_k", "temperature", "eos_token_id", "max_length",
    "attn_implementation", "tokenizer_class", "model_max_length", "chat_template", "added_tokens_decoder", "truncation",
    "padding", "normalizer", "dtype", "architectures", "num_key_value_heads", "is_encoder_decoder", "id2label",
    "add_cross_attention", "chunk_size_feed_forward",
)  # fmt: skip
"""Keys that mean something to transformers in one of the files."""
