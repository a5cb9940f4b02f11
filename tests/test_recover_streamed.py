"""Recovering a model that is read from disk block by block gives what recovering it in memory gives."""

import json

import pytest
import tiny
import torch
from plans import write_plan
from safetensors.torch import load_file, save_file

import spd_calib
from spd_calib.api import recover as api
from spd_calib.api.progress import Progress
from spd_calib.errors import InputError
from spd_calib.formats.files import read
from spd_calib.formats.plan import Plan
from spd_calib.models.load import load_dense, locate, read_config
from spd_calib.models.stream_load import BlockWeights
from spd_calib.recovery import recover as recovery
from spd_calib.recovery import stored_form

SELECTION = spd_calib.TextSelection(seq_len=24, max_samples=24, verify_samples=8)
NORMS, MIXTURES = ("gemma2", "olmo2"), ("mixtral",)
FAMILIES = ("llama", "opt", "phi3", "gemma4", "minicpm3", "qwen3_5", *NORMS, *MIXTURES)


def recover(folder, plan, out, text, *, stream, **given):
    asked = {name: given.pop(name) for name in ("dtype", "batch_size") if name in given}
    run = spd_calib.RunOptions(device="cpu", stream=stream, **{"dtype": "float32", "batch_size": 4} | asked)
    return spd_calib.recover(plan, out, data=str(text), model=folder, text=SELECTION, run=run, **given)


def kill(folder, plan, out, text, *, stream, at):
    """Begin a recovery, and end it where it says what begins so."""

    def end(note: str) -> None:
        if note.startswith(at):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recover(folder, plan, out, text, stream=stream, progress=Progress(step=end))


def weights_in(folder):
    """Return the parameters of a checkpoint as transformers' own class has them."""
    source = locate(str(folder))
    return load_dense(source, read_config(source), device="cpu", dtype="float32").state_dict()


def same(one, other):
    """Say whether two recovered checkpoints are the same: weights, plan, predictors, and what was tried."""
    a, b = weights_in(one), weights_in(other)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    plans = [json.loads((folder / "plan.json").read_text()) for folder in (one, other)]
    for plan in plans:
        del plan["provenance"], plan["model"]["id"]
    assert plans[0] == plans[1]
    reports = [json.loads((folder / "recovery.json").read_text()) for folder in (one, other)]
    tried = [[(a["block"], a["treatment"], a["kept"], a["kl_after"]) for a in r["attempts"]] for r in reports]
    assert tried[0] == tried[1]
    files = [sorted(p.name for p in folder.glob("compensation*")) for folder in (one, other)]
    assert files[0] == files[1]
    for name in files[0]:
        x, y = load_file(one / name), load_file(other / name)
        assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_that_of_the_model_in_memory(family, text, tmp_path):
    tiny.save(tiny.build(family), folder := tmp_path / "model")
    kinds = ["scaled mean", None, "scaled mean", "scaled mean"] if family in NORMS else ()
    routers = ["mean", None, "mean", "mean"] if family in MIXTURES else ()
    attention = ["block_drop", "keep_sync", "block_drop", "block_drop"]
    plan = write_plan(tmp_path / "plan.json", folder, 2, attention, kinds=kinds, routers=routers)
    for stream in (False, True):
        recover(folder, plan, tmp_path / f"out-{stream}", text, stream=stream)
    same(tmp_path / "out-False", tmp_path / "out-True")


def test_with_heads_replicated_and_blocks_given_back(text, tmp_path):
    """A second pass begins from the dense weights again, and the first one's stay where it wins nothing."""
    tiny.save(tiny.build("llama"), folder := tmp_path / "model")
    plan = write_plan(tmp_path / "plan.json", folder, 2, ["block_drop"] * 4)
    for stream in (False, True):
        recover(folder, plan, tmp_path / f"out-{stream}", text, stream=stream, replicate="15%", max_kl=0.05)
    same(tmp_path / "out-False", tmp_path / "out-True")
    blocks = read(Plan, tmp_path / "out-True" / "plan.json").blocks
    assert any(block.replicated for block in blocks), "no block has heads replicated: nothing was tested"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weights_are_rounded_to_what_they_are_stored_in(text, tmp_path, dtype):
    """In one file or in many; what is verified is what is written."""
    tiny.save(tiny.build("qwen3").to(torch.bfloat16), folder := tmp_path / "model")
    plan = write_plan(tmp_path / "plan.json", folder, 2, ["block_drop"] * 4)
    for stream in (False, True):
        recover(folder, plan, tmp_path / f"out-{stream}", text, stream=stream, dtype=dtype)
    same(tmp_path / "out-False", tmp_path / "out-True")
    assert {t.dtype for t in load_file(tmp_path / "out-True" / "model.safetensors").values()} == {torch.bfloat16}


def test_in_several_files(text, tmp_path, monkeypatch):
    tiny.save(tiny.build("llama"), folder := tmp_path / "model")
    plan = write_plan(tmp_path / "plan.json", folder, 2, ["block_drop"] * 4)
    recover(folder, plan, tmp_path / "one", text, stream=True)
    monkeypatch.setattr(stored_form, "PIECE_BYTES", 50_000)
    recover(folder, plan, tmp_path / "many", text, stream=True)
    same(tmp_path / "one", tmp_path / "many")
    files = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(files) > 3 and files[-1].name == f"model-{len(files):05}-of-{len(files):05}.safetensors"
    assert max(sum(t.nbytes for t in load_file(file).values()) for file in files) <= 50_000


@pytest.mark.parametrize("stream", [True, False])
def test_few_blocks_weights_are_in_memory(text, tmp_path, monkeypatch, stream):
    """The dense block, the treated one, and one that lies on disk as it runs; in memory all of both models are."""
    tiny.save(tiny.build("llama", num_hidden_layers=8), folder := tmp_path / "model")
    plan = write_plan(tmp_path / "plan.json", folder, 2, ["block_drop"] * 8)
    models, held = [], []
    load = api._load
    monkeypatch.setattr(api, "_load", lambda *args, **kwargs: models.append(load(*args, **kwargs)) or models[0])

    def count(note: str) -> None:
        layers = [*models[0]._layers, *(student.layer for student in models[0].students.values())]
        matrices = [p for layer in layers for p in layer.parameters() if p.dim() > 1]
        sizes = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in matrices}
        held.append(sum(sizes.values()) / sum(p.numel() * 4 for p in models[0]._layers[0].parameters()))

    recover(folder, plan, tmp_path / "out", text, stream=stream, progress=Progress(step=count))
    assert held and (max(held) < 3 if stream else max(held) > 12), held


def test_weights_are_read_as_often_for_much_text_as_for_little(text, tmp_path, monkeypatch):
    tiny.save(tiny.build("llama"), folder := tmp_path / "model")
    plan = write_plan(tmp_path / "plan.json", folder, 2, ["block_drop"] * 4)
    hold, found = BlockWeights.hold, []

    def count(weights, block):
        found[-1] += block == 2 and weights.held != block
        hold(weights, block)

    monkeypatch.setattr(BlockWeights, "hold", count)
    for size in (2, 8):
        found.append(0)
        recover(folder, plan, tmp_path / f"out-{size}", text, stream=True, batch_size=size)
    assert found[0] == found[1] < 9, found


@pytest.mark.parametrize(("first", "second"), [(True, True), (True, False), (False, True)])
def test_a_killed_run_goes_on(text, tmp_path, monkeypatch, first, second):
    """From what lies on disk, streamed or not: the state is the same."""
    tiny.save(tiny.build("llama"), folder := tmp_path / "model")
    plan, out = write_plan(tmp_path / "plan.json", folder, 2, ["block_drop"] * 4), tmp_path / "out"
    recover(folder, plan, tmp_path / "whole", text, stream=False)

    kill(folder, plan, out, text, stream=first, at="block 2, refit of o")
    assert (tmp_path / "out.partial").is_dir()
    treated, treat = [], recovery.treat_block
    monkeypatch.setattr(recovery, "treat_block", lambda block, *a, **k: treated.append(block) or treat(block, *a, **k))
    recover(folder, plan, out, text, stream=second)
    assert treated == [2, 3] and not list(tmp_path.glob("*.partial"))
    same(tmp_path / "whole", out)


def test_training_needs_the_model_in_memory(text, tmp_path):
    tiny.save(tiny.build("llama"), folder := tmp_path / "model")
    plan = write_plan(tmp_path / "plan.json", folder, 2, ["block_drop"] * 4)
    with pytest.raises(InputError, match="distillation trains a model that is in memory"):
        recover(folder, plan, tmp_path / "out", text, stream=True, methods=["refit", "distillation"])


@pytest.mark.parametrize("fits", [True, False])
def test_a_model_too_large_is_streamed_without_being_asked(text, tmp_path, monkeypatch, fits):
    tiny.save(tiny.build("llama"), folder := tmp_path / "model")
    plan = write_plan(tmp_path / "plan.json", folder, 2, ["block_drop"] * 4)
    monkeypatch.setattr("spd_calib.models.stream_load._free_memory", lambda device: 1e12 if fits else 1e5)
    said = []
    recover(folder, plan, tmp_path / "out", text, stream=False, progress=Progress(say=said.append))
    assert any("read from disk" in line for line in said) != fits


def test_a_state_that_lost_a_file_is_refused(text, tmp_path):
    tiny.save(tiny.build("llama"), folder := tmp_path / "model")
    plan, out = write_plan(tmp_path / "plan.json", folder, 2, ["block_drop"] * 4), tmp_path / "out"

    kill(folder, plan, out, text, stream=False, at="block 2")
    (tmp_path / "out.partial" / "closed-form-1.1.safetensors").unlink()
    with pytest.raises(InputError, match=r"out\.partial held closed-form-1\.1\.safetensors; remove the folder"):
        recover(folder, plan, out, text, stream=False)


def test_a_second_copy_of_tied_weights_is_left_out(text, tmp_path):
    tiny.save(tiny.build("qwen3"), folder := tmp_path / "model")
    stored = load_file(folder / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    plan = write_plan(tmp_path / "plan.json", folder, 2, ["block_drop"] * 4)
    recover(folder, plan, tmp_path / "out", text, stream=True, dtype="bfloat16")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


def test_weights_that_change_meanwhile_are_refused(text, tmp_path):
    tiny.save(tiny.build("llama"), folder := tmp_path / "model")
    tiny.save(tiny.build("llama", seed=1), other := tmp_path / "other")
    plan = write_plan(tmp_path / "plan.json", folder, 2, ["block_drop"] * 4)

    def replace(note: str) -> None:
        if note.startswith("block 1, refit of o"):
            (other / "model.safetensors").replace(folder / "model.safetensors")

    with pytest.raises(InputError, match=r"model\.safetensors has changed since"):
        recover(folder, plan, tmp_path / "out", text, stream=True, progress=Progress(step=replace))
    assert not (tmp_path / "out").exists()


def test_what_a_killed_run_had_written_is_removed(text, tmp_path):
    tiny.save(tiny.build("llama"), folder := tmp_path / "model")
    plan = write_plan(tmp_path / "plan.json", folder, 2, ["block_drop"] * 4)
    (tmp_path / ".out.part").mkdir()
    (tmp_path / ".out.part" / "piece-0").write_text("half")
    recover(folder, plan, tmp_path / "out", text, stream=True)
    assert not (tmp_path / ".out.part").exists() and not (tmp_path / "out" / "piece-0").exists()


@pytest.mark.parametrize("damage", ["no note", "no blocks", "no weight", "no run"])
def test_a_damaged_state_is_refused(text, tmp_path, damage):
    tiny.save(tiny.build("llama"), folder := tmp_path / "model")
    plan, out = write_plan(tmp_path / "plan.json", folder, 2, ["block_drop"] * 4), tmp_path / "out"

    kill(folder, plan, out, text, stream=False, at="block 2")
    step, state = (tmp_path / "out.partial" / f"closed-form-1{part}.safetensors" for part in ("", ".1"))
    if damage == "no run":
        (tmp_path / "out.partial" / "run").unlink()
    elif damage == "no weight":
        kept = {name: t for name, t in load_file(state).items() if "o_proj" not in name}
        save_file(kept, state, metadata={"note": "{}"})
    else:
        save_file({}, step, metadata=None if damage == "no note" else {"note": '{"attempts": []}'})
    with pytest.raises(InputError, match=r"out\.partial"):
        recover(folder, plan, out, text, stream=True)
