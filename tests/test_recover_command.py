"""`spd-calib recover`, and the same from Python."""

import json

import pytest
import tiny
import torch
from planned_models import EVERY
from plans import write_plan
from safetensors.torch import load_file, save_file

import spd_calib
from spd_calib.api.progress import Progress
from spd_calib.errors import InputError
from spd_calib.formats.drops import Point
from spd_calib.formats.files import read
from spd_calib.formats.plan import Plan
from spd_calib.formats.profile import Profile
from spd_calib.models.plan_files import load_plan
from spd_calib.recovery.precision import bfloat16_slowdown

SELECTION = spd_calib.TextSelection(seq_len=24, max_samples=24, verify_samples=8)


def test_the_command(spd, tmp_path, profile_file, text) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    assert spd("plan", profile_file, "--drop", 1, "--strategy", "block_drop", "-o", plan, "--device", "cpu").code == 0
    given = ("--data", text, "--seq-len", 32, "--max-samples", 24, "--verify-samples", 6, "--device", "cpu")
    run = spd(
        "recover", plan, *given, "-o", out, "--methods", "compensation", "--max-rank", 0, "--tau1", 0, "--tau2", 0
    )
    assert run.code == 0 and "verified on other text" in run.err
    assert (out / "plan.json").exists() and not list(tmp_path.glob("*.partial"))
    report = json.loads((out / "recovery.json").read_text())
    assert report["kl"] <= report["kl_as_is"] and report["attempts"][0]["detail"]["form"] == "mean"

    bad = tmp_path / "bad"
    assert "none of grouping" in spd("recover", plan, *given, "-o", bad, "--methods", "magic").err
    assert "no learning rate" in spd("recover", plan, *given, "-o", bad, "--rate", "inf").err
    assert "there already" in spd("recover", plan, *given, "-o", out).err
    changed = json.loads(plan.read_text())
    changed["model"]["weight_fingerprint"] = "0" * 64
    (tmp_path / "changed.json").write_text(json.dumps(changed))
    run = spd("recover", tmp_path / "changed.json", *given, "-o", bad)
    assert run.code == 2 and "the weights differ" in run.err
    for block in changed["blocks"]:
        block["strategy"] = "keep_sync"
    (tmp_path / "nothing.json").write_text(json.dumps(changed))
    run = spd("recover", tmp_path / "nothing.json", *given, "-o", bad)
    assert run.code == 2 and "nothing to recover" in run.err
    few = ("--data", text, "--seq-len", 32, "--max-samples", 6, "--verify-samples", 6, "--device", "cpu")
    run = spd("recover", plan, *few, "-o", bad)
    assert run.code == 2 and "too few" in run.err
    assert not bad.exists() and not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob(".bad*"))


def test_a_plan_that_drops_mlps_alone_is_trained(spd, tmp_path, llama, text) -> None:
    kept = ["keep_sync"] * 4
    plan = write_plan(tmp_path / "plan.json", llama, 4, kept, ["keep_sync", "block_drop", "block_drop", "keep_sync"])
    given = ("--data", text, "--seq-len", 24, "--max-samples", 24, "--verify-samples", 8, "--device", "cpu")
    run = spd("recover", plan, *given, "-o", tmp_path / "out")
    assert run.code == 2 and "add distillation" in run.err
    methods = ("--methods", "grouping,compensation,refit,distillation", "--steps", 10, "--final-steps", 20, "--tau1", 0)
    run = spd("recover", plan, *given, "-o", tmp_path / "out", *methods)
    assert run.code == 0, run.err
    report = json.loads((tmp_path / "out" / "recovery.json").read_text())
    assert [(a["block"], a["treatment"]) for a in report["attempts"]] == [
        (1, "distillation"), (2, "distillation"), (None, "distillation end to end")]  # fmt: skip
    (first, _), second, whole = [(a["detail"]["error_before"], a["detail"]["error_after"]) for a in report["attempts"]]
    assert first < 1e-9, "what the first block owes is not lost: the second is the first that reads less than it should"
    assert second[1] < second[0] and whole[1] < whole[0] and report["kl"] <= report["kl_as_is"]
    assert set(report["tiers"]) == {"1", "2"}
    recovered = read(Plan, tmp_path / "out" / "plan.json")
    assert recovered.requires == ["mlp_drop"] and recovered.drops == read(Plan, plan).drops


def test_from_python_the_plan_comes_back_and_progress_is_told(llama, text, tmp_path) -> None:
    plan = write_plan(tmp_path / "plan.json", llama, 4, ["keep_sync", "block_drop", "keep_sync", "keep_sync"])
    said, expected, steps = [], [], []
    progress = Progress(say=said.append, expect=expected.append, step=steps.append)
    options = {"data": str(text), "text": SELECTION, "methods": ["compensation", "distillation"], "steps": 2,
               "final_steps": 2, "run": spd_calib.RunOptions(device="cpu")}  # fmt: skip
    made = spd_calib.recover(plan, tmp_path / "out", **options, progress=progress)
    assert made == read(Plan, tmp_path / "out" / "plan.json") and made.recovered_from == read(Plan, plan).model
    assert any("to fit on" in s for s in said) and 0 < len(steps) <= sum(expected)
    again = spd_calib.recover(read(Plan, plan), tmp_path / "again", **options)  # the document in place of its file
    assert again.verified == made.verified
    for name in ("model.safetensors", "compensation.safetensors"):
        files = [tmp_path / folder / name for folder in ("out", "again")]
        assert files[0].exists() == files[1].exists()
        if files[0].exists():
            one, two = map(load_file, files)
            assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_a_checkpoint_in_bfloat16_stays_in_bfloat16(text, tmp_path) -> None:
    """Weights are stored as they were, and what is verified is what is stored.

    The rotary frequencies that old checkpoints hold in float32 beside them do not count.
    """
    model = tiny.build("llama").to(torch.bfloat16)
    folder = tiny.save(model, tmp_path / "model")
    held = load_file(folder / "model.safetensors")
    frequencies = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(4)}
    save_file(held | frequencies, folder / "model.safetensors", metadata={"format": "pt"})
    plan = write_plan(tmp_path / "plan.json", folder, 4, ["block_drop"] * 4)
    made = spd_calib.recover(
        plan, tmp_path / "out", data=str(text), text=SELECTION, methods=["grouping", "distillation"], steps=10,
        final_steps=10, run=spd_calib.RunOptions(device="cpu"),
    )  # fmt: skip
    assert made.provenance.dtype == "float32"
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for t in written.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    again = verified_again(made, tmp_path / "out", text)
    assert abs(again.kl - made.verified.kl) < 1e-4 * made.verified.kl


def test_refitted_weights_are_the_checkpoint(llama, text, tmp_path) -> None:
    """Free at run time: no predictor, no `requires`, and the weights as written cost what was verified."""
    plan = write_plan(tmp_path / "plan.json", llama, 4, ["block_drop"] * 4)
    made = spd_calib.recover(
        plan, tmp_path / "out", data=str(text), text=SELECTION, methods=["grouping", "refit"],
        run=spd_calib.RunOptions(device="cpu", batch_size=4),
    )  # fmt: skip
    report = json.loads((tmp_path / "out" / "recovery.json").read_text())
    assert report["kl"] < report["kl_as_is"] and not made.requires and made.compensation is None
    assert any("refit of down" in b.reason for b in made.blocks)
    again = verified_again(made, tmp_path / "out", text)
    assert abs(again.kl - made.verified.kl) < 1e-4 * made.verified.kl


@pytest.mark.parametrize(("family", "max_rank"), [("llama", 8), ("opt", 0), ("gemma2", 8), ("mixtral", 8)])
def test_in_bfloat16_as_much_is_won_as_in_float32(family, max_rank, text, tmp_path) -> None:
    folder = tiny.save(tiny.build(family), tmp_path / "model")
    plan = write_plan(tmp_path / "plan.json", folder, 2, ["block_drop"] * 4)
    reports = {}
    for dtype in ("float32", "bfloat16"):
        spd_calib.recover(
            plan, tmp_path / dtype, data=str(text), text=SELECTION, max_rank=max_rank, exchange=0.0, steps=3,
            final_steps=0, methods=["grouping", "compensation", "refit", "distillation"], tau1=0, tau2=0,
            run=spd_calib.RunOptions(device="cpu", dtype=dtype),
        )  # fmt: skip
        reports[dtype] = json.loads((tmp_path / dtype / "recovery.json").read_text())
    wide, narrow = (r["kl"] / r["kl_as_is"] for r in reports.values())
    assert wide < 0.95 and narrow == pytest.approx(wide, rel=0.2), reports


@pytest.mark.parametrize("methods", [["grouping", "compensation", "refit"], ["grouping", "refit"]])
def test_a_mixture_kept_until_it_is_recovered_says_what_its_routers_read(spd, methods, text, tmp_path) -> None:
    """By the paper's rule; else a runtime would know nothing of the router's predictor."""
    folder = tiny.save(tiny.build("mixtral"), tmp_path / "model")
    given = ("--data", text, "--seq-len", 24, "--max-samples", 12, "--verify-samples", 8, "--device", "cpu")
    profile, plan = tmp_path / "profile.json", tmp_path / "plan.json"
    assert spd("profile", folder, "--tp", 4, *given, "--strategy", "block_drop", "-o", profile).code == 0
    assert spd("plan", profile, "--tau1", 0, "--tau2", 0, "--device", "cpu", "-o", plan).code == 0
    assert all(b.recovery and b.router is None for b in read(Plan, plan).blocks)
    options = {"data": str(text), "text": SELECTION, "run": spd_calib.RunOptions(device="cpu")}
    made = spd_calib.recover(plan, tmp_path / "out", methods=methods, **options)
    assert "router_predictor" in made.requires and all(b.router is not None for b in made.blocks)
    assert any(b.router.kind != "zero" for b in made.blocks) == ("compensation" in methods)
    _, drops = load_plan(tmp_path / "out" / "plan.json")
    found = [drops.at(Point(b.index, "attention")).router for b in made.blocks]
    assert [r.kind if r else "zero" for r in found] == [b.router.kind for b in made.blocks]


def test_behind_a_norm_blocks_kept_until_recovered_have_estimates_as_others_do(spd, text, tmp_path) -> None:
    folder = tiny.save(tiny.build("gemma2"), tmp_path / "model")
    given = ("--data", text, "--seq-len", 24, "--max-samples", 24, "--verify-samples", 8, "--device", "cpu")
    profile = tmp_path / "profile.json"
    assert spd("profile", folder, "--tp", 4, *given, "--strategy", "block_drop", "-o", profile).code == 0
    costs = {}
    for name, budget in (("waiting", ("--tau1", 0, "--tau2", 0)), ("dropped", ("--drop", "100%"))):
        plan, out = tmp_path / f"{name}.json", tmp_path / name
        options = ("--strategy", "block_drop") if name == "dropped" else ()
        assert spd("plan", profile, *budget, *options, "--device", "cpu", "-o", plan).code == 0
        assert spd("recover", plan, *given, "-o", out, "--methods", "grouping,refit").code == 0
        assert all(b.compensation and b.compensation.scaled for b in read(Plan, out / "plan.json").blocks)
        costs[name] = json.loads((out / "recovery.json").read_text())["kl_as_is"]
    assert costs["waiting"] == pytest.approx(costs["dropped"], rel=0.1)


def test_what_was_not_done_is_not_said(spd, llama, text, tmp_path) -> None:
    """Plain drops are left as they are, and a training is said of the blocks that it trained."""
    given = ("--data", text, "--seq-len", 24, "--max-samples", 24, "--verify-samples", 8, "--device", "cpu")
    plain = write_plan(tmp_path / "plain.json", llama, 4, ["plain_drop"] * 4)
    run = spd("recover", plain, *given, "-o", tmp_path / "out", "--methods", "distillation")
    assert run.code == 2 and "plain_drop alone" in run.err
    mixed = write_plan(tmp_path / "mixed.json", llama, 4, ["plain_drop", "block_drop", "block_drop", "keep_sync"])
    run = spd("recover", mixed, *given, "-o", tmp_path / "out", "--methods", "refit,distillation", "--steps", 0,
              "--final-steps", 25, "--tau1", 0, "--tau2", 0)  # fmt: skip
    assert run.code == 0, run.err
    reasons = [b.reason for b in read(Plan, tmp_path / "out" / "plan.json").blocks]
    assert reasons[0].endswith("dropped as it is") and "distill" in reasons[1] and "distill" in reasons[2]
    assert "None" not in "".join(reasons)


def test_within_a_budget_blocks_are_given_back_and_the_plan_says_so(spd, llama, text, tmp_path) -> None:
    plan = write_plan(tmp_path / "plan.json", llama, 4, ["block_drop"] * 4, mlp=["block_drop"] * 3 + ["keep_sync"])
    run = spd("recover", plan, "--data", text, "--seq-len", 24, "--max-samples", 24, "--verify-samples", 8, "-o",
              tmp_path / "out", "--methods", "compensation", "--device", "cpu", "--max-kl", 0.05)  # fmt: skip
    assert run.code == 0, run.err
    made = read(Plan, tmp_path / "out" / "plan.json")
    back = [b for b in made.blocks if b.strategy == "keep_sync"]
    assert back and all(b.mlp_strategy == "keep_sync" and "kept again" in b.reason and not b.compensation for b in back)
    assert made.budget.kind == "max_kl" and made.budget.value == 0.05
    assert ("mlp_drop" in made.requires) == made.drops.requires_mlp_drop
    assert abs(verified_again(made, tmp_path / "out", text).kl - made.verified.kl) < 1e-4 * max(made.verified.kl, 1e-3)


def test_a_checkpoint_whose_blocks_were_all_given_back_is_profiled_as_what_it_is(spd, llama, text, tmp_path) -> None:
    """The dense model: so nothing is dropped whatever a new plan says."""
    plan = write_plan(tmp_path / "plan.json", llama, 4, ["block_drop"] * 4)
    said = ["--data", text, "--seq-len", 24, "--max-samples", 24, "--verify-samples", 8, "--device", "cpu"]
    run = spd("recover", plan, *said, "-o", tmp_path / "out", "--methods", "compensation", "--max-kl", 0)
    assert run.code == 0, run.err
    made = read(Plan, tmp_path / "out" / "plan.json")
    assert not made.drops and made.verified.kl < 1e-9
    run = spd("profile", tmp_path / "out", "--tp", 4, *said, "-o", tmp_path / "again.json")
    assert run.code == 0, run.err
    assert not read(Profile, tmp_path / "again.json").settled


def test_a_recovery_for_another_budget_does_not_go_on_from_this_one(llama, text, tmp_path) -> None:
    class Killed(Exception):
        pass

    def kill(note: str) -> None:
        if "given back alone" in note:
            raise Killed

    plan = write_plan(tmp_path / "plan.json", llama, 4, ["block_drop"] * 4)
    said = {"data": str(text), "text": SELECTION, "run": spd_calib.RunOptions(device="cpu")}
    with pytest.raises(Killed):
        spd_calib.recover(plan, tmp_path / "out", **said, max_kl=0.0001, progress=Progress(step=kill))
    with pytest.raises(InputError, match="another recovery"):
        spd_calib.recover(plan, tmp_path / "out", **said, max_kl=0.002)
    steps, expected = [], []
    counting = Progress(step=steps.append, expect=expected.append)
    spd_calib.recover(plan, tmp_path / "whole", **said, max_kl=0.0001, progress=counting)
    assert 0 < len(steps) <= sum(expected)


def test_heads_are_replicated_where_the_recovered_model_costs_most(spd, llama, text, tmp_path) -> None:
    plan = write_plan(tmp_path / "plan.json", llama, 4, ["block_drop"] * 4)
    said = [plan, "--data", text, "--seq-len", 24, "--max-samples", 24, "--verify-samples", 8, "--device", "cpu"]
    run = spd("recover", *said, "--methods", "compensation", "-o", tmp_path / "out", "--replicate", "40%")
    assert run.code == 0, run.err
    made = read(Plan, tmp_path / "out" / "plan.json")
    chosen = [b.index for b in made.blocks if b.replicated]
    assert made.drops.replicated == dict.fromkeys(chosen, EVERY) and 0 < len(chosen) < 4
    assert {"replicated_heads", "compensation"} <= set(made.requires) and len(made.drops) == 4
    for block in made.blocks:
        assert ("all heads of other ranks replicated: KL" in block.reason) == (block.index in chosen)
        assert not (block.compensation and block.index in chosen)
    assert abs(verified_again(made, tmp_path / "out", text).kl - made.verified.kl) < 1e-4 * made.verified.kl

    for share, why in (
        ("10%", "less than all heads of other ranks take in one block"),
        ("0%", "less than one KV group"),
    ):
        run = spd("recover", *said, "-o", tmp_path / "none", "--replicate", share)
        assert run.code in (1, 2) and why in run.err and not (tmp_path / "none").exists(), run.err
    of_mlps = write_plan(tmp_path / "mlps.json", llama, 4, ["keep_sync"] * 4, mlp=["block_drop"] * 3 + ["keep_sync"])
    run = spd("recover", of_mlps, *said[1:], "-o", tmp_path / "none", "--replicate", "40%", "--methods", "distillation")
    assert run.code == 2 and "no heads can be replicated" in run.err and not (tmp_path / "none").exists()
    again = spd("recover", tmp_path / "out" / "plan.json", *said[1:], "-o", tmp_path / "none", "--replicate", "40%")
    assert again.code == 2 and "replicates heads already" in again.err


def test_blocks_that_wait_for_recovery_may_replicate_heads(spd, profile_file, text, tmp_path) -> None:
    """Of the paper's rule: the plan keeps their syncs until they are treated."""
    plan = tmp_path / "plan.json"
    made = spd("plan", profile_file, "--tau1", 0, "--tau2", 0, "-o", plan, "--device", "cpu")
    assert made.code == 0 and not read(Plan, plan).drops and all(b.recovery for b in read(Plan, plan).blocks), made.err
    run = spd("recover", plan, "--data", text, "--seq-len", 24, "--max-samples", 24, "--verify-samples", 8, "--device",
              "cpu", "--methods", "compensation", "-o", tmp_path / "out", "--replicate", "40%")  # fmt: skip
    assert run.code == 0, run.err
    assert set(read(Plan, tmp_path / "out" / "plan.json").drops.replicated.values()) == {EVERY}


def test_two_budgets_are_refused(spd, llama, text, tmp_path) -> None:
    plan = write_plan(tmp_path / "plan.json", llama, 4, ["block_drop"] * 4)
    run = spd("recover", plan, "--data", text, "-o", tmp_path / "o", "--max-kl", 1, "--max-ppl-increase", "1%")
    assert run.code == 2 and "two budgets" in run.err and not (tmp_path / "o").exists()


def verified_again(plan: Plan, folder, text):
    """What the checkpoint costs against the model it was made from, both loaded anew, on the sequences verified on."""
    from spd_calib.api.text import load_texts_for
    from spd_calib.models.plan_files import load_plan
    from spd_calib.parallel.session import open_session
    from spd_calib.sensitivity.measure import Subject, measure

    recovered, original = open_session(str(folder), 4), open_session(plan.recovered_from.id, 4)
    (found,) = load_texts_for(recovered, [str(text)], SELECTION)
    subject = Subject(recovered.load(), load_plan(folder / "plan.json")[1], original.load())
    return measure(subject, found.verification, plans=[plan.drops.only([])])[1][0]


@pytest.mark.parametrize("settings", [{"temperature": 0.9, "do_sample": False}, {"eos_token_id": 1}, None])
def test_settings_of_generation_are_copied_whatever_they_are(tmp_path, text, settings):
    """transformers refuses to write some that it reads: sampling's, where nothing is sampled."""
    folder = tiny.save(tiny.build("llama"), tmp_path / "model")
    (folder / "generation_config.json").unlink(missing_ok=True)
    if settings is not None:
        (folder / "generation_config.json").write_text(json.dumps(settings))
    plan = write_plan(tmp_path / "plan.json", folder, 2, ["block_drop"] * 4)
    for stream in (False, True):
        run = spd_calib.RunOptions(device="cpu", stream=stream)
        spd_calib.recover(plan, tmp_path / f"{stream}", data=str(text), text=SELECTION, run=run)
        written = tmp_path / f"{stream}" / "generation_config.json"
        assert (json.loads(written.read_text()) if written.exists() else None) == settings


@pytest.mark.parametrize("slower", [0.3, 1.4, 7.1])
def test_mixed_is_refused_where_it_is_slower(tmp_path, llama, text, monkeypatch, slower):
    monkeypatch.setattr("spd_calib.api.recover.bfloat16_slowdown", lambda device: slower)
    plan = write_plan(tmp_path / "plan.json", llama, 2, ["block_drop"] * 4)
    given = {"data": str(text), "text": SELECTION, "run": spd_calib.RunOptions(device="cpu"), "mixed": True}
    training = {"methods": ["refit", "distillation"], "steps": 1, "final_steps": 1}
    if slower < 7:
        assert spd_calib.recover(plan, tmp_path / "out", **given, **training).verified.kl >= 0
    else:
        with pytest.raises(InputError, match=r"on this cpu products of bfloat16 take 7\.1 times as long"):
            spd_calib.recover(plan, tmp_path / "out", **given, **training)
        spd_calib.recover(plan, tmp_path / "out", **given)  # without training it means nothing


def test_a_slowdown_is_a_ratio_of_times():
    assert 0.01 < bfloat16_slowdown("cpu") < 100
