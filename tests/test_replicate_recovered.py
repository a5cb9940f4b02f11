"""Heads replicated in a recovered model: where the whole wins most, and the dense block there, until it is refitted."""

import pytest
import tiny
import torch
from planned_models import EVERY, extreme, heads, planned, sequences

from spd_calib.errors import InputError
from spd_calib.formats.drops import Drops, Point, Strategy
from spd_calib.planning.model_sizes import Added
from spd_calib.planning.replication import Affordable
from spd_calib.recovery.held_out import HeldOut
from spd_calib.recovery.options import RecoveryOptions
from spd_calib.recovery.planned_model import PlannedModel
from spd_calib.recovery.recover import recover
from spd_calib.recovery.replicate import with_every_head, worth_replicating
from spd_calib.recovery.report import REPLICATED, TOGETHER


def test_the_blocks_that_cost_most_after_recovery_are_the_dense_models() -> None:
    model, text = planned(layers=4), sequences(8, seed=1)
    options = RecoveryOptions(methods=("compensation", "refit"), max_rank=0)
    alone = planned(layers=4)
    recovered = recover(alone, fitting=sequences(16), held_out=text, tiers=extreme(alone), options=options)
    report = recover(model, fitting=sequences(16), held_out=text, tiers=extreme(model), options=options, heads=heads(2))
    chosen = {a.block: a.fell for a in report.attempts if a.treatment == REPLICATED}
    assert set(model.drops.replicated) == set(chosen) and len(chosen) == 2
    assert report.kl < recovered.kl
    assert report.kl == pytest.approx(HeldOut(model, text).measure().kl(), rel=1e-6)
    students = dict(alone.students)
    wins = {}
    for block in students:  # what each wins in the recovered model, with that block alone kept
        alone.students = {i: s for i, s in students.items() if i != block}
        wins[block] = -HeldOut(alone, text).measure().kl()
    alone.students = students
    before = HeldOut(alone, text).measure().kl()
    assert set(sorted(wins, key=wins.__getitem__)[2:]) == set(chosen)
    cut = [a.treatment for a in report.attempts].index(REPLICATED)
    for block, fell in chosen.items():
        assert fell == pytest.approx(before + wins[block], rel=1e-3)
        assert model.students[block].predictors is None
        undone = [a for a in report.attempts[:cut] if a.block == block]
        assert undone and not any(a.kept for a in undone)


def test_a_block_with_every_head_is_the_dense_block_with_its_sync_dropped() -> None:
    model = planned(layers=2)
    for student in with_every_head(model, [0, 1], EVERY):
        model.put(student)
    ids = torch.tensor(sequences(2, seed=3))
    recording = model.lm.record(ids)
    assert (model.lm.logits(model.run(recording)) - model.lm.logits(recording.final)).abs().max() < 1e-5
    assert set(model.drops) == {Point(0, "attention"), Point(1, "attention")}  # dropped, all the same
    assert worth_replicating(model, HeldOut(model, sequences(4)), [0, 1], heads=heads(0), tick=lambda note: None) == []


def test_where_mlps_are_dropped_too_a_block_is_said_to_win_what_it_does() -> None:
    """Its MLP's sync stays dropped, and it reads streams that differ by rank: it is not the dense block."""
    points = [Point(i, "attention") for i in range(3)] + [Point(i, "mlp") for i in range(2)]
    model = PlannedModel(tiny.build("llama", layers=3), 4, Drops.of(dict.fromkeys(points, Strategy.BLOCK_DROP)))
    text = HeldOut(model, sequences(8, seed=1))
    before = text.measure().kl()
    chosen = worth_replicating(model, text, [0, 1, 2], heads=heads(3), tick=lambda note: None)
    assert chosen
    for attempt in chosen:
        as_it_was = model.put(with_every_head(model, [attempt.block], EVERY)[0])
        assert attempt.fell == pytest.approx(before - text.measure().kl(), rel=1e-4)
        model.put(as_it_was)


def test_a_mixture_of_experts_is_refused_before_anything_is_fitted() -> None:
    model, every, notes = planned("qwen2_moe", tp=2), ((1,), (0,)), []
    with pytest.raises(InputError, match="mixture of experts"):
        recover(model, fitting=sequences(16), held_out=sequences(8), tiers=extreme(model),
                heads=Affordable(1, every, None, Added(), 0.1), tick=notes.append)  # fmt: skip
    assert not notes


def test_all_blocks_are_treated_anew_those_with_every_head_from_the_dense_block() -> None:
    """What they made up for is gone; where that wins nothing the first treatments stay."""
    options = RecoveryOptions(methods=("compensation", "refit"), max_rank=0)
    model, text = planned(layers=3), sequences(8, seed=1)
    report = recover(model, fitting=sequences(16), held_out=text, tiers=extreme(model), options=options, heads=heads(1))
    (exact,) = model.drops.replicated
    whole = [a for a in report.attempts if a.treatment == TOGETHER]
    assert len(whole) == 2 and set(whole[1].detail["anew"]) == {0, 1, 2}
    assert report.kl == pytest.approx(whole[1].kl_after if whole[1].kept else whole[1].kl_before)
    other = next(b for b in (0, 1, 2) if b != exact)
    cut = [a.treatment for a in report.attempts].index(REPLICATED)
    first, second = ([a for a in part if a.block == other] for part in (report.attempts[:cut], report.attempts[cut:]))
    assert first and second and not any(a.kept for a in (first if whole[1].kept else second))
    replicated, *refits = (a for a in report.attempts[cut:] if a.block == exact)
    assert replicated.kept and "undone" not in replicated.detail, "it has every head still"
    assert {a.treatment.partition(" of ")[0] for a in refits} == {"refit"}, "nothing is missing that could be predicted"
    dense = planned(layers=3).students[exact].layer.parameters()
    untouched = all(torch.equal(p, q) for p, q in zip(model.students[exact].layer.parameters(), dense, strict=True))
    assert untouched == (not any(a.kept for a in refits))
    missing = refits[0].detail["error_before"]
    assert missing > 1e-3 or not any(a.kept for a in refits), "where nothing is missing rounding is all there is to fit"
