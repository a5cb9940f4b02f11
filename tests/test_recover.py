"""Recovery as a whole: the rule that nothing gets worse, tiers, going on after a kill, and too little to work with."""

from pathlib import Path

import pytest
import torch
from planned_models import extreme, heads, planned, sequences

from spd_calib.errors import InputError
from spd_calib.formats.drops import Drops, Point, Strategy
from spd_calib.formats.files import dumps
from spd_calib.formats.plan import Budget
from spd_calib.formats.recovery import Recovery
from spd_calib.models.load import load_dense, load_tokenizer, locate, read_config
from spd_calib.recovery import closed_form
from spd_calib.recovery import recover as recover_module
from spd_calib.recovery.distillation import Schedule
from spd_calib.recovery.held_out import HeldOut, kl_fall
from spd_calib.recovery.journal import TensorJournal
from spd_calib.recovery.options import METHODS, REFIT_PARTS, RecoveryOptions
from spd_calib.recovery.planned_model import PlannedModel
from spd_calib.recovery.recover import recover
from spd_calib.recovery.report import TOGETHER
from spd_calib.sensitivity.text import TextOptions, load_text
from spd_calib.sensitivity.tiers import tiers


def test_recovery_makes_the_whole_plan_better_and_only_keeps_what_does() -> None:
    model = planned("opt", tp=4, layers=2)
    schedule = Schedule(steps=15, check_every=5)
    options = RecoveryOptions(methods=METHODS, block_schedule=schedule, whole_schedule=schedule, batch_size=8)
    report = recover(
        model, fitting=sequences(48), held_out=sequences(12, seed=1), tiers=extreme(model), options=options
    )
    assert report.kl < 0.7 * report.kl_as_is
    treatments = {a.treatment for a in report.attempts}
    assert treatments >= {"compensation", "grouping", "refit of down", "distillation", TOGETHER}
    now = report.kl_as_is
    for block in (0, 1):  # without training: by the error at the block's output
        alone = [a.detail for a in report.attempts if a.block == block and a.kl_before is None]
        error = alone[0]["error_before"]
        for a in (a for a in report.attempts if a.block == block and a.kl_before is None):
            assert a.detail["error_before"] == error and a.kept == (a.detail["error_after"] < error - 1e-13)
            error = a.detail["error_after"] if a.kept else error
    for a in (a for a in report.attempts if a.kl_before is not None):
        assert a.kl_before == pytest.approx(now) and a.kept == (a.fell > a.fell_stderr)
        now = a.kl_after if a.kept else now
    assert report.kl == pytest.approx(now) == HeldOut(model, sequences(12, seed=1)).measure().kl()
    document = report.document(tiers_from="given", documents={})
    assert Recovery.model_validate_json(dumps(document), strict=True) == document
    everything = HeldOut(model, sequences(12, seed=1)).measure()
    assert kl_fall(everything, everything) == (0.0, 0.0)


def test_a_bad_treatment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def ruin(student, *args, **kw):
        with torch.no_grad():
            student.parts.down.weight.mul_(-1)

    monkeypatch.setattr(closed_form, "group_neurons", ruin)
    model = planned(layers=2, drop=[1])
    before = model.students[1]
    options = RecoveryOptions(methods=("grouping",))
    report = recover(model, fitting=sequences(16), held_out=sequences(6, seed=1), tiers=extreme(model), options=options)
    assert [a.kept for a in report.attempts] == [False] and model.students[1] is before
    assert report.kl == report.kl_as_is


def test_insensitive_blocks_are_left_alone_and_sensitive_ones_are_not_regrouped() -> None:
    assert tiers({0: 0.01, 1: 0.3, 2: 0.9}) == {0: "insensitive", 1: "sensitive", 2: "extremely sensitive"}
    assert set(tiers({0: 0.01, 1: 0.3}, 0.0, 0.0).values()) == {"extremely sensitive"}
    with pytest.raises(InputError, match="not in order"):
        tiers({0: 0.1}, 0.5, 0.1)
    model = planned(layers=2)
    schedule = Schedule(steps=4, check_every=2)
    report = recover(
        model,
        fitting=sequences(16),
        held_out=sequences(4, seed=1),
        tiers={0: "insensitive", 1: "sensitive"},
        options=RecoveryOptions(
            methods=("grouping", "compensation", "distillation"), block_schedule=schedule, whole_schedule=schedule
        ),
    )
    assert {a.block for a in report.attempts} == {1, None}
    assert "grouping" not in {a.treatment for a in report.attempts}


def test_with_refit_insensitive_blocks_are_given_what_is_free_at_run_time() -> None:
    model = planned(layers=2)
    report = recover(
        model,
        fitting=sequences(16),
        held_out=sequences(4, seed=1),
        tiers={0: "insensitive", 1: "sensitive"},
        options=RecoveryOptions(methods=("grouping", "compensation", "refit"), max_rank=64, exchange=0.0),
    )
    forms = {a.block: a.detail["form"] for a in report.attempts if a.treatment == "compensation"}
    assert forms[0] == "mean" and forms[1] != "mean"
    assert {a.block for a in report.attempts if a.treatment == "grouping"} == {0, 1}


@pytest.mark.parametrize(("parts", "form"), [(REFIT_PARTS, "mean"), (("down",), "full")])
def test_where_what_the_mlp_reads_is_refitted_a_mean_shift_is_the_default(parts, form) -> None:
    model = planned(layers=1)
    options = RecoveryOptions(methods=("compensation", "refit"), refit_parts=parts, exchange=0.0)
    report = recover(model, fitting=sequences(16), held_out=sequences(4, seed=1), tiers=extreme(model), options=options)
    assert [a.detail["form"] for a in report.attempts if a.treatment == "compensation"] == [form]


def test_what_makes_the_whole_worse_is_taken_back_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last blocks' treatments, however good each looked at its own output; what is before them stays."""
    model = planned(layers=4)
    as_is, treat = dict(model.students), recover_module.treat_block

    def treat_and_ruin(block, *args, **kwargs):
        treat(block, *args, **kwargs)
        if block == 2:
            student = model.students[block].copy()
            with torch.no_grad():
                student.parts.down.weight.mul_(-3)
            model.put(student)

    monkeypatch.setattr(recover_module, "treat_block", treat_and_ruin)
    options = RecoveryOptions(methods=("refit", "compensation"), max_rank=0)
    report = recover(model, fitting=sequences(32), held_out=sequences(8, seed=1), tiers=extreme(model), options=options)
    together = [(a.detail["up_to_block"], a.kept) for a in report.attempts if a.treatment == TOGETHER]
    assert together == [(3, False), (1, True), (2, False)]
    assert [model.students[i] is as_is[i] for i in range(4)] == [False, False, True, True]
    assert report.kl < report.kl_as_is and report.kl == HeldOut(model, sequences(8, seed=1)).measure().kl()
    assert [any(a.kept for a in report.of(i)) for i in range(4)] == [True, True, False, False]


def test_a_recovery_killed_before_its_judgement_is_judged_as_if_it_had_not_been(tmp_path, monkeypatch) -> None:
    """Blocks that nothing helped come back from the journal as copies; they are not among those treated."""
    treat = recover_module.treat_block

    def treat_some(block, *args, **kwargs):
        if block < 2:
            return
        treat(block, *args, **kwargs)
        if block == 3:
            student = kwargs["feed"].model.students[3].copy()
            with torch.no_grad():
                student.parts.down.weight.mul_(-3)
            kwargs["feed"].model.put(student)

    class Killed(Exception):
        pass

    def kill(note: str) -> None:
        if note.startswith("all treated"):
            raise Killed

    monkeypatch.setattr(recover_module, "treat_block", treat_some)
    options = RecoveryOptions(methods=("grouping", "compensation", "refit"), max_rank=0)
    said = {"fitting": sequences(32), "held_out": sequences(8, seed=1), "options": options}
    whole, killed, again = (planned(layers=4) for _ in range(3))
    expected = recover(whole, tiers=extreme(whole), **said)
    with pytest.raises(Killed), TensorJournal(tmp_path / "state", {"run": 1}) as journal:
        recover(killed, tiers=extreme(killed), **said, journal=journal, tick=kill)
    with TensorJournal(tmp_path / "state", {"run": 1}) as journal:
        report = recover(again, tiers=extreme(again), **said, journal=journal)
    tried = [[(a.detail["up_to_block"], a.kept) for a in r.attempts if a.block is None] for r in (expected, report)]
    assert tried[0] == tried[1] == [(3, False), (2, True)] and report.kl == expected.kl


@pytest.mark.parametrize(("max_rank", "exact", "within"), [(64, 0, None), (3, 0, None), (0, 1, None), (0, 0, 0.1)])
def test_a_killed_recovery_goes_on_where_it_was(tmp_path: Path, max_rank: int, exact: int, within) -> None:
    """To the same bits: with full and low-rank predictors, a block of replicated heads, and one given back."""
    schedule = Schedule(steps=6, check_every=2)
    options = RecoveryOptions(
        methods=METHODS, exchange=0.0, max_rank=max_rank, block_schedule=schedule, whole_schedule=schedule
    )
    budget = within and Budget(kind="max_kl", value=within, strategies=[Strategy.BLOCK_DROP])
    text = {
        "fitting": sequences(16), "held_out": sequences(4, seed=1), "heads": heads(exact) if exact else None,
        "budget": budget,
    }  # fmt: skip
    whole = planned(layers=2)
    expected = recover(whole, **text, tiers=extreme(whole), options=options)

    class Killed(Exception):
        pass

    def kill(note: str) -> None:
        if "distilling block 1, step 4" in note:
            raise Killed

    model = planned(layers=2)
    with pytest.raises(Killed), TensorJournal(tmp_path / "state", {"run": 1}) as journal:
        recover(model, **text, tiers=extreme(model), options=options, journal=journal, tick=kill)
    model = planned(layers=2)
    with TensorJournal(tmp_path / "state", {"run": 1}) as journal:
        report = recover(model, **text, tiers=extreme(model), options=options, journal=journal)
    assert report.kl == expected.kl
    for block, student in model.students.items():
        state, through = student.state(), whole.students[block].state()
        assert state.keys() == through.keys() and all(torch.equal(state[k], through[k]) for k in state)
    assert [(a.block, a.treatment) for a in report.attempts] == [(a.block, a.treatment) for a in expected.attempts]
    assert not list((tmp_path / "state").glob("training-*"))  # four times what was trained
    with pytest.raises(InputError, match="another recovery"):
        TensorJournal(tmp_path / "state", {"run": 2})


def test_too_little_text_and_a_plan_that_drops_nothing() -> None:
    model = planned(layers=2)
    with pytest.raises(InputError, match="too few"):
        recover(model, fitting=sequences(3), held_out=sequences(3), tiers=extreme(model))
    model = planned(layers=2, drop=[])
    with pytest.raises(InputError, match="drops nothing"):
        recover(model, fitting=sequences(16), held_out=sequences(3), tiers={})


SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.mark.skipif(not (SHARED / "models/stories260k").exists(), reason="../shared/models/stories260k is not here")
@pytest.mark.parametrize(("methods", "bar"), [(("grouping",), 0.75), (("grouping", "compensation"), 0.63)])
def test_stories260k_without_training(methods, bar: float) -> None:
    source = locate(str(SHARED / "models/stories260k"))
    config, tokenizer = read_config(source), load_tokenizer(source)
    drops = Drops.of({Point(i, "attention"): Strategy.BLOCK_DROP for i in range(5)})
    model = PlannedModel(load_dense(source, config, device="cpu", dtype="float32"), 4, drops)
    fit = load_text(TextOptions(str(SHARED / "data/tinystories-calibration.jsonl"), 256, 64, 160, 32), tokenizer)
    other = load_text(TextOptions(str(SHARED / "data/tinystories-eval.jsonl"), 256, 128, 48, 1), tokenizer)
    measured = HeldOut(model, other.calibration)
    as_is = measured.measure().kl()
    options = RecoveryOptions(methods=methods, exchange=0.0, batch_size=8)
    recover(model, fitting=fit.calibration, held_out=fit.verification, tiers=extreme(model), options=options)
    assert measured.measure().kl() <= bar * as_is
