"""A plan file, read again and run, costs what it says that it costs: `verified` is of the file, not of what it was."""

import json

import pytest
import tiny
import torch

import spd_calib
from spd_calib.api.latency import LatencyOptions
from spd_calib.api.opening import open_model
from spd_calib.api.plan import plan_with_details
from spd_calib.api.text import NOTHING_FITTED, TextSelection, load_texts_for
from spd_calib.formats.drops import NOTHING_DROPPED
from spd_calib.formats.files import read
from spd_calib.formats.plan import Plan
from spd_calib.formats.profile import Profile
from spd_calib.formats.recovery import REPORT_FILE, Recovery
from spd_calib.models.plan_files import load_plan
from spd_calib.planning.budget_options import BudgetOptions
from spd_calib.reporting import tables
from spd_calib.sensitivity.measure import Subject, measure

RUN = spd_calib.RunOptions(device="cpu", batch_size=4)
SELECTION = TextSelection(seq_len=24, max_samples=16, verify_samples=8)


def cost_of(path, *, again=False):
    """Return what the plan in a file costs on the text it was verified on, against its model or its original.

    `again`: it was made of the recovered checkpoint that lies beside it.
    """
    plan, drops = load_plan(path)
    session = open_model(plan.model.id, tp=plan.tensor_parallel.size)
    v = plan.verified.text
    selection = TextSelection(v.seq_len, v.min_len, v.first, v.sequences, v.pack)
    fitted = read(Recovery, path.parent / "out" / REPORT_FILE).documents if again else NOTHING_FITTED
    (text,) = load_texts_for(session, [v.source], selection, fitted=fitted)
    assert text.verification_ref().sha256 == v.sha256
    original = open_model(plan.recovered_from.id, tp=1).load() if plan.recovered_from else None
    subject = Subject(session.load(drops=drops), original=original)
    return measure(subject, text.verification, plans=[drops], batch_size=4)[1][0].kl


def holds(path, **given):
    """Say whether a plan file costs what it says."""
    said = read(Plan, path).verified.kl
    assert said > 1e-6 and cost_of(path, **given) == pytest.approx(said, rel=1e-3, abs=1e-7)


@pytest.fixture(scope="module")
def profiled(tmp_path_factory, text):
    """Return a folder of models, and a profile of attentions and MLPs of each."""
    folder = tmp_path_factory.mktemp("as_written")
    for family in ("llama", "gemma2"):
        tiny.save(tiny.build(family), folder / family)
        profile = spd_calib.profile(
            str(folder / family), tp=2, data=str(text), text=SELECTION, sync_points=["attention", "mlp"],
            strategies=["block_drop"], run=RUN,
        )  # fmt: skip
        (folder / f"{family}.json").write_text(profile.model_dump_json())
    return folder


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize(
    "asked",
    [
        {"drop": 5},
        {"drop": 5, "sync_bits": 8},
        {"drop": 3, "sync_bits": 6, "replicate": "30%"},
        {"max_bytes": "40%"},
        {"min_speedup": "1%", "sync_bits": "any", "latency": LatencyOptions("dgx-spark-200gbe")},
    ],
    ids=lambda asked: "-".join(asked),
)
def test_a_plan(profiled, tmp_path, family, asked):
    options = {name: asked[name] for name in ("sync_bits", "replicate", "latency") if name in asked}
    budget = BudgetOptions(**{name: value for name, value in asked.items() if name not in options})
    plan_with_details(profiled / f"{family}.json", budget, **options, run=RUN).write(tmp_path / "plan.json")
    holds(tmp_path / "plan.json")


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("asked", [{"max_bytes": "40%"}, {"drop": 5, "sync_bits": 8}], ids=str)
def test_the_bytes_of_a_plan(profiled, family, asked):
    """Those that its messages really have, also where a deferred sum travels beside the next one, behind a norm."""
    plan = spd_calib.plan(profiled / f"{family}.json", run=RUN, **asked)
    lm = open_model(plan.model.id, tp=2).load("cpu", "bfloat16")  # 16 bits a value
    comm, sent = lm.blocks[0].comm, []
    for drops in (NOTHING_DROPPED, plan.drops):
        before = comm.bytes
        with lm.running(drops):
            lm(torch.randint(4, 100, (1, 8)))
        sent.append(comm.bytes - before)
    share = sent[1] / sent[0]
    assert f"; {100 * share:.0f} % of the bytes of all at 16 bits a value" in tables.saving(plan)
    assert share <= 0.4 or plan.budget.kind != "max_bytes"


def recovered(profiled, tmp_path, text, family, *, drop="100%", replicate=None, **given):
    """Plan, recover, and return the recovered folder."""
    made = plan_with_details(profiled / f"{family}.json", BudgetOptions(drop=drop), replicate=replicate, run=RUN)
    made.write(tmp_path / "plan.json")
    few = TextSelection(seq_len=24, max_samples=24, verify_samples=8)
    spd_calib.recover(tmp_path / "plan.json", tmp_path / "out", data=str(text), text=few, run=RUN, **given)
    return tmp_path / "out"


def test_a_block_with_every_head_that_is_given_back_keeps_its_mlps_sync(profiled, tmp_path, text):
    """It is the dense model's again, the attention's sync dropped for nothing; so says the plan."""
    out = recovered(profiled, tmp_path, text, "llama", replicate="30%", max_kl=1e-5, methods=["grouping"])
    blocks = read(Plan, out / "plan.json").blocks
    assert any(b.replicated and b.strategy == "block_drop" and b.mlp_strategy == "keep_sync" for b in blocks)
    assert cost_of(out / "plan.json") <= 2e-5


@pytest.mark.parametrize("given", [{}, {"max_kl": 0.15}, {"replicate": "30%", "max_kl": 0.15}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_recovered_plan(profiled, tmp_path, text, family, given):
    holds(recovered(profiled, tmp_path, text, family, drop=6, **given) / "plan.json")


@pytest.mark.parametrize("mlps_alone", [False, True])
def test_a_plan_made_again_of_a_recovered_checkpoint(profiled, tmp_path, text, mlps_alone):
    """Its predictors of MLPs stay, too, with those of attentions and without."""
    if mlps_alone:
        profile = read(Profile, profiled / "gemma2.json")
        alone = [m for m in profile.measurements if m.sync_point == "mlp"]
        (profiled / "mlps.json").write_text(profile.model_copy(update={"measurements": alone}).model_dump_json())
        training = {"methods": ["refit", "distillation"], "steps": 2, "final_steps": 2}
        out = recovered(profiled, tmp_path, text, "mlps", **training)
    else:
        out = recovered(profiled, tmp_path, text, "gemma2", drop=4)
    before = json.loads((out / "plan.json").read_text())["blocks"]
    assert any("mlp_compensation" in b for b in before)
    profile = spd_calib.profile(
        str(out), tp=2, data=str(text), text=SELECTION, sync_points=["attention", "mlp"], strategies=["block_drop"],
        run=RUN,
    )  # fmt: skip
    dropped = len(profile.settled)
    for more in (0, 1):
        made = plan_with_details(profile, BudgetOptions(drop=dropped + more), model=str(out), run=RUN)
        made.write(tmp_path / f"again-{more}.json")
        holds(tmp_path / f"again-{more}.json", again=True)
