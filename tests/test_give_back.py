"""Giving blocks back to the dense model until a recovered model keeps a budget."""

import pytest
import torch
from planned_models import EVERY, extreme, heads, planned, sequences

from spd_calib.formats.drops import Point, Strategy
from spd_calib.formats.plan import Budget
from spd_calib.planning.budget import kept
from spd_calib.recovery.give_back import give_back
from spd_calib.recovery.held_out import HeldOut
from spd_calib.recovery.options import RecoveryOptions
from spd_calib.recovery.recover import recover
from spd_calib.recovery.replicate import with_every_head
from spd_calib.recovery.report import DENSE_AGAIN, GIVEN_BACK, REPLICATED


def budget(value: float, kind: str = "max_kl") -> Budget:
    return Budget(kind=kind, value=value, strategies=[Strategy.BLOCK_DROP])


def given_back(model, held_out, asked):
    return give_back(model, held_out, asked, measured=held_out.measure().comparison(), tick=lambda note: None)


def kl_by_hand(model, text) -> float:
    """KL(dense || planned) a token, both run whole, the planned one block by block as its students say."""
    dense = torch.cat([model.lm(torch.tensor([ids])) for ids in text]).double().log_softmax(-1)
    with torch.no_grad():
        finals = [model.run(model.lm.record(torch.tensor([ids]))) for ids in text]
    found = torch.cat([model.lm.logits(final) for final in finals]).double().log_softmax(-1)
    return float((dense.exp() * (dense - found)).sum(-1)[:, :-1].mean())


def test_the_costliest_blocks_go_and_no_more_than_must() -> None:
    model, text = planned(layers=4), sequences(12, seed=1)
    held_out, students = HeldOut(model, text), dict(model.students)
    whole = held_out.measure().kl()
    tried = given_back(model, held_out, budget(0.5 * whole))
    left = held_out.measure().comparison()
    assert 0 < len(tried) < 4 and kept(budget(0.5 * whole), left, certain=True)
    assert set(model.students) == set(students) - {a.block for a in tried}
    assert left.kl == pytest.approx(kl_by_hand(model, text), rel=1e-4)
    wins = [a.fell for a in tried]
    assert wins == sorted(wins, reverse=True)
    for block in students:  # alone, on the first sequences: none of those that stayed wins more
        model.students = {i: s for i, s in students.items() if i != block}
        fell = HeldOut(model, text[:4]).measure().kl()
        model.students = students
        assert block in {a.block for a in tried} or HeldOut(model, text[:4]).measure().kl() - fell <= wins[-1] + 1e-9
    model.students = {i: s for i, s in students.items() if i not in {a.block for a in tried[:-1]}}
    assert not kept(budget(0.5 * whole), held_out.measure().comparison(), certain=True)


def test_within_its_budget_nothing_is_given_back_and_beyond_any_everything() -> None:
    model, text = planned(layers=2), sequences(8, seed=1)
    held_out = HeldOut(model, text)
    assert given_back(model, held_out, budget(100.0, "max_ppl_increase")) == []
    tried = given_back(model, held_out, budget(0.0))
    assert len(tried) == 2 and not model.students and not model.drops and held_out.measure().kl() == 0


def recovered_within(model, text, asked, **more):
    """The report of a recovery without training within a budget."""
    options = RecoveryOptions(methods=("grouping", "refit"), max_rank=0)
    return recover(
        model,
        fitting=sequences(16),
        held_out=text,
        tiers=extreme(model),
        options=options,
        budget=asked,
        **more,
    )


def test_a_recovery_ends_within_its_budget() -> None:
    model = planned(layers=3)
    text = sequences(8, seed=1)
    as_is = HeldOut(model, text).measure().kl()
    report = recovered_within(model, text, budget(0.3 * as_is))
    given = [a.block for a in report.attempts if a.treatment == GIVEN_BACK]
    assert report.kl <= 0.3 * as_is and given and set(given) == {0, 1, 2} - set(model.students)


def test_a_block_with_all_heads_keeps_a_budget_without_its_sync() -> None:
    """Its dense weights are enough: given back with the others, it is dropped still."""
    model, text = planned(layers=3), sequences(8, seed=1)
    (exact,) = with_every_head(model, [1], EVERY)
    off = exact.copy()
    with torch.no_grad():
        off.parts.down.weight.mul_(1.5)  # as a fit to other text may leave it
    model.put(off)
    held_out = HeldOut(model, text)
    tried = given_back(model, held_out, budget(1e-6))
    assert {a.block: a.treatment for a in tried} == {0: GIVEN_BACK, 1: DENSE_AGAIN, 2: GIVEN_BACK}
    assert set(model.drops) == {Point(1, "attention")} and kl_by_hand(model, text) < 1e-6


def test_a_replicated_block_of_a_recovery_is_never_kept_again() -> None:
    model, text = planned(layers=3), sequences(8, seed=1)
    report = recovered_within(model, text, budget(1e-6), heads=heads(1))
    (block,) = [a.block for a in report.attempts if a.treatment == REPLICATED]
    assert set(model.students) == {block} and report.kl < 1e-6
    assert all(a.kept for a in report.attempts if a.treatment == REPLICATED), "its heads are where they were put"
    fitted = [a for a in report.attempts if a.block == block and "refit" in a.treatment]
    assert not any(a.kept for a in fitted) or kl_by_hand(model, text) < 1e-6


def test_what_is_not_given_back_is_fitted_anew_behind_what_will_run() -> None:
    def recovered(within: Budget | None):
        model = planned(layers=4)
        return model, recovered_within(model, text, within)

    text, within = sequences(8, seed=1), budget(0.04)
    (whole, _), (model, report) = recovered(None), recovered(within)
    anew = next(a for a in report.attempts if "anew" in a.detail)
    assert anew.kept and set(anew.detail["anew"]) >= set(model.students) and 0 < len(model.students) < 4
    treatments = [a.treatment for a in report.attempts]
    assert treatments.index(GIVEN_BACK) < report.attempts.index(anew), "given back before the others were fitted"
    left = HeldOut(model, text).measure().comparison()
    assert kept(within, left, certain=True) and report.kl == pytest.approx(kl_by_hand(model, text), rel=1e-4)
    whole.students = {i: s for i, s in whole.students.items() if i in model.students}
    assert left.kl < HeldOut(whole, text).measure().kl()
