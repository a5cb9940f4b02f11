"""What recovery leaves behind: a checkpoint that loads anywhere, with a plan that runs; whole or not at all."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from plans import write_plan
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import spd_calib
from spd_calib.api.text import load_texts_for
from spd_calib.errors import InputError, SpdError
from spd_calib.formats.files import read
from spd_calib.formats.plan import Plan
from spd_calib.models.plan_files import load_drops, load_plan
from spd_calib.parallel.session import open_session
from spd_calib.recovery import checkpoint
from spd_calib.recovery.block_tiers import tiers_of
from spd_calib.sensitivity.measure import Subject, measure

SELECTION = spd_calib.TextSelection(seq_len=24, max_samples=24, verify_samples=8)


def recovered(folder: Path, llama: Path, text: Path, *, output: Path | None = None, **options) -> Plan:
    """The tiny model with every attention's sync point dropped, recovered without training into `folder`/out."""
    given = write_plan(folder / "given.json", llama, 4, ["block_drop"] * 4)
    plan = read(Plan, given)
    given.unlink()
    return spd_calib.recover(
        plan,
        output or folder / "out",
        data=str(text),
        text=SELECTION,
        methods=("grouping", "compensation"),
        exchange=0.0,
        run=spd_calib.RunOptions(device="cpu", batch_size=16),
        **options,
    )


def test_the_checkpoint_is_the_same_dense_model_and_its_plan_runs(tmp_path, llama, text) -> None:
    new = recovered(tmp_path, llama, text)
    out, ids = tmp_path / "out", tiny.tokens(2, 16)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    with torch.no_grad():
        was, now = (AutoModelForCausalLM.from_pretrained(f)(ids).logits for f in (llama, out))
    assert (was - now).abs().max() < 1e-5
    assert (
        AutoTokenizer.from_pretrained(out)("a cat").input_ids == AutoTokenizer.from_pretrained(llama)("a cat").input_ids
    )
    plan, drops = load_plan(out / "plan.json")
    assert plan == new and plan.requires == ["compensation"] and plan.recovered_from is not None
    session = open_session(plan.model.id, 4, expected=plan.model)
    (found,) = load_texts_for(session, [str(text)], SELECTION)
    assert plan.verified.text == found.verification_ref()
    again = measure(Subject(session.load()), found.verification, plans=[drops])[1][0]
    assert again.kl == pytest.approx(plan.verified.kl, rel=1e-4)

    with pytest.raises(InputError, match="recovered already"):
        tiers_of(plan)
    loose = tmp_path / "elsewhere.json"
    loose.write_text((out / "plan.json").read_text())
    with pytest.raises(InputError, match="copy both files together"):
        load_plan(loose)
    file = out / "compensation.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match="not the file"):
        load_drops(plan, out / "plan.json")
    for wrong in ("../x.safetensors", "/x.safetensors", "x.bin", ".x.safetensors"):
        text_of = json.loads((out / "plan.json").read_text())
        text_of["compensation"]["file"] = wrong
        loose.write_text(json.dumps(text_of))
        with pytest.raises(InputError, match="not a valid plan"):
            read(Plan, loose)
    for key in ("requires", "compensation"):
        text_of = json.loads((out / "plan.json").read_text())
        text_of[key] = [] if key == "requires" else None
        loose.write_text(json.dumps(text_of))
        with pytest.raises(InputError, match="not a valid plan"):
            read(Plan, loose)


def full_disk(*args, **kw):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_no_half_written_checkpoint(tmp_path, llama, text, monkeypatch) -> None:
    """What was found on the way stays in out.partial, for the run that goes on."""
    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(SpdError, match="No space left on device; make room"):
        recovered(tmp_path, llama, text)
    assert [p.name for p in tmp_path.iterdir()] == ["out.partial"]
    monkeypatch.undo()
    recovered(tmp_path, llama, text)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_output_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").write_text("x")
    with pytest.raises(InputError, match="there already"):
        checkpoint.check_output(tmp_path / "there")
    with pytest.raises(InputError, match="does not exist"):
        checkpoint.check_output(tmp_path / "no" / "such")
    with pytest.raises(InputError, match="is a mount point"):
        checkpoint.check_output(Path("/"))


@pytest.mark.parametrize("name", ["link", "."])
def test_an_empty_folder_by_another_name_is_written(tmp_path, llama, text, monkeypatch, name) -> None:
    """It is replaced by the checkpoint's folder; of a link that is the one it names."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    monkeypatch.chdir(tmp_path / "empty")
    recovered(tmp_path, llama, text, output=Path(name) if name == "." else tmp_path / name)
    assert (tmp_path / "empty" / "plan.json").exists() and not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("said", ["bfloat16", "int8"])
def test_what_is_verified_is_what_is_written_whatever_the_configuration_says(tmp_path, llama, text, said) -> None:
    """Its files hold float32, and so do those of the checkpoint: nothing is rounded after it was measured."""
    model = shutil.copytree(llama, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "dtype": said}))
    plan = recovered(tmp_path, model, text)
    session = open_session(plan.model.id, 4, expected=plan.model)
    (found,) = load_texts_for(session, [str(text)], SELECTION)
    original = open_session(str(model), 4).load()
    drops = load_drops(plan, tmp_path / "out/plan.json")
    subject = Subject(session.load(drops=drops), drops, original)
    assert measure(subject, found.verification, plans=[drops])[1][0].kl == pytest.approx(plan.verified.kl, rel=1e-6)
    tensors = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "out"))
    assert [{t.dtype for t in of_folder.values()} for of_folder in tensors] == [{torch.float32}] * 2
