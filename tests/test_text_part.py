"""The language model inside a model of text and images: every logit as the whole gives it for text alone."""

import json

import pytest
import torch
from multimodal import KINDS, save
from plans import write_plan
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from spd_calib import RunOptions, TextSelection, check, recover
from spd_calib.errors import InputError
from spd_calib.models.load import load_dense, locate, read_config
from spd_calib.models.shard_load import load_sharded
from spd_calib.models.text_part import WITH_TEXT_PART
from spd_calib.parallel.session import open_session
from spd_calib.runtimes.plan_checks import check_same_model


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_read_as_the_whole_model_reads_it(kind, tmp_path):
    whole = save(tmp_path, kind)
    assert type(whole).__name__ in WITH_TEXT_PART
    ids = torch.randint(3, 90, (2, 12))
    with torch.no_grad():
        expected = whole(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    source = locate(str(tmp_path))
    dense = load_dense(source, read_config(source), device="cpu", dtype="float32")
    with torch.no_grad():
        torch.testing.assert_close(dense(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
    for stream in (False, True):
        session = open_session(str(tmp_path), 2)
        lm = session.load("cpu", "float32", stream=stream)
        torch.testing.assert_close(lm(ids), expected, rtol=1e-5, atol=1e-4)
    load_sharded(source, read_config(source), rank=1, tp=2, device="cpu", dtype="float32")
    assert session.ref.architecture == type(whole).__name__ and session.ref.num_blocks == 2


def test_the_weights_of_every_part_are_accounted_for(tmp_path):
    save(tmp_path, "llava")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    lost = next(n for n in tensors if "vision" in n)
    save_file({n: t for n, t in tensors.items() if n != lost}, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lack .*vision"):
        open_session(str(tmp_path), 2)


def test_a_class_that_does_more_to_text_is_refused(tmp_path):
    AutoConfig.for_model("paligemma").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="what it does to text beside its language model"):
        open_session(str(tmp_path), 2)


def test_the_profile_names_the_whole_model(spd, text, tmp_path):
    save(folder := tmp_path / "model", "mistral3")
    outcome = spd("profile", folder, "--tp", 2, "--data", text, "--seq-len", 16, "--max-samples", 4,
                  "--verify-samples", 2, "--device", "cpu", "-o", tmp_path / "p.json")  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert json.loads((tmp_path / "p.json").read_text())["model"]["architecture"] == "Mistral3ForConditionalGeneration"


@pytest.mark.parametrize("kind", ["llava", "gemma4"])
def test_a_recovered_text_part_lies_in_the_whole(kind, text, tmp_path):
    """transformers' own class of the whole reads the recovered weights; of the rest not a byte is another."""
    save(folder := tmp_path / "model", kind)
    before = load_file(folder / "model.safetensors")
    # in two files
    half = dict(list(before.items())[::2])
    rest = {n: t for n, t in before.items() if n not in half}
    names = {"model-00001-of-00002.safetensors": half, "model-00002-of-00002.safetensors": rest}
    for name, tensors in names.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: name for name, tensors in names.items() for n in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    plan = write_plan(tmp_path / "plan.json", folder, 2, ["block_drop", "block_drop"])
    out, few = tmp_path / "out", TextSelection(seq_len=24, max_samples=20, verify_samples=4)
    made = recover(plan, out, data=str(text), text=few, run=RunOptions(device="cpu"))
    assert made.recovered_from.weight_fingerprint != made.model.weight_fingerprint
    after = load_file(out / "model.safetensors")
    changed = {n for n, t in after.items() if not torch.equal(t, before[n])}
    assert after.keys() == before.keys() and changed and all(".layers." in n and "vision" not in n for n in changed)
    whole = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32).eval()
    ids = torch.randint(3, 90, (2, 12))
    with torch.no_grad():
        expected = whole(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(open_session(str(out), 2).load()(ids), expected, rtol=1e-5, atol=1e-4)
    assert check(out / "plan.json").ok
    named = {"architecture": type(whole).__name__, "blocks": 2, "revision": None}
    check_same_model(made, out / "plan.json", model=str(out), **named)  # as an engine's plugin does
    with pytest.raises(InputError, match="other weights"):
        check_same_model(made, out / "plan.json", model=str(folder), **named)
