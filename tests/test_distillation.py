"""Training a block on the dense one: the error falls, a killed training goes on, replicas share the text."""

import copy
from types import SimpleNamespace

import pytest
import tiny
import torch
from planned_models import planned, sequences

from spd_calib.recovery import distillation
from spd_calib.recovery.distillation import Schedule, TrainingHooks, distil_block, distil_together
from spd_calib.recovery.feed import Feed
from spd_calib.recovery.held_out import HeldOut


def test_distillation_lessens_the_error_and_goes_on_after_a_kill() -> None:
    schedule = Schedule(steps=20, check_every=10)
    model = planned("llama", tp=4, layers=1)
    feed = Feed(model, sequences(32), batch_size=4)
    through = model.students[0].copy()
    states: list[dict] = []
    keeping = TrainingHooks(save=lambda t: states.append(copy.deepcopy(t)))
    outcome = distil_block(through, feed, schedule=schedule, hooks=keeping)
    assert outcome.after < 0.9 * outcome.before and outcome.steps == 20
    again = model.students[0].copy()  # killed after ten steps: what it held is lost, the checkpoint is not
    resumed = distil_block(again, feed, schedule=schedule, hooks=TrainingHooks(saved=states[0]))
    assert resumed.after == pytest.approx(outcome.after, rel=1e-5)
    for a, b in zip(through.layer.parameters(), again.layer.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    dense, ids = model.lm, tiny.tokens(1, 8)
    assert torch.equal(dense(ids), planned("llama", tp=4, layers=1).lm(ids)), "the dense model is left alone"


def test_a_step_on_some_positions_of_a_large_vocabulary_still_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    model = planned("llama", tp=4, layers=2)
    feed = Feed(model, sequences(32), batch_size=4)
    kl = HeldOut(model, [[*t, 0] for t in sequences(32)[-4:]]).measure().kl()  # no next token of the last is counted
    monkeypatch.setattr(distillation, "LOGITS", 4 * 3 * model.lm.head.vocab_size)  # three positions of a batch
    students = [model.students[i].copy() for i in (0, 1)]
    for student in students:
        model.put(student)
    drawn = distillation._draw(8, 3, 0), distillation._draw(8, 3, 1)
    assert all(len(set(at.tolist())) == 3 for at in drawn) and not torch.equal(*drawn)
    outcome = distil_together(students, feed, schedule=Schedule(steps=20, check_every=10), hooks=TrainingHooks())
    assert outcome.before == pytest.approx(kl, rel=1e-4) and outcome.after < 0.9 * outcome.before


def test_replicas_share_every_batch() -> None:
    """Five sequences in batches of three, two replicas: rows 0 and 2 | 1 of the first, 0 | 1 of the second."""
    model = planned(layers=4)
    sequences = [t.tolist()[: 8 + i] for i, t in enumerate(tiny.tokens(5, 16))]
    whole = Feed(model, sequences, batch_size=3)
    shares = [Feed(model, sequences, batch_size=3, replicas=SimpleNamespace(ranks=[r], size=2)) for r in (0, 1)]
    for number, rows in enumerate([([0, 2], [1]), ([0], [1])]):
        for share, own in zip(shares, rows, strict=True):
            batch = share.batches[number]
            torch.testing.assert_close(batch.dense, whole.batches[number].dense[own])
            assert torch.equal(batch.mask, whole.batches[number].mask[own])
    alone = Feed(model, sequences[:4], batch_size=3, replicas=SimpleNamespace(ranks=[1], size=2)).batches[1]
    assert len(alone.dense) == 1 and not alone.mask.any()  # no row is left for it
