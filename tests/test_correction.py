"""Predictions corrected by measurements: against a model of random effects solved by hand, and on made-up truths."""

import math

import pytest
import tiny
import torch

from spd_calib.errors import InputError
from spd_calib.formats.profile import Fisher
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.sensitivity.correction import factors, joined, random_effects
from spd_calib.sensitivity.fisher import DRAWS, predict
from spd_calib.sensitivity.metrics import Tally
from spd_calib.sensitivity.predictions import FIELDS

TOKENS = 10


def tally(kl: list[float]) -> Tally:
    """Of one KL per token a sequence, of TOKENS tokens each."""
    rows = torch.zeros(len(kl), len(FIELDS), dtype=torch.float64)
    rows[:, FIELDS.index("kl")] = torch.tensor(kl, dtype=torch.float64) * TOKENS
    return Tally(list(rows), [TOKENS] * len(kl))


def corrected(predicted: list[float], measured: dict, sequences: int, s: float, hardness=None) -> list[float]:
    """Predicted KL times its factor, where every sequence costs as much, or by its `hardness`."""
    hard = torch.ones(sequences) if hardness is None else torch.tensor(hardness)
    q = hard.double()[:, None] * torch.tensor(predicted, dtype=torch.float64) * TOKENS
    tokens = torch.full((sequences,), float(TOKENS), dtype=torch.float64)
    factor, left = factors(q, tokens, measured, sampling_error=s)
    assert (left >= 0).all() and left.isfinite().all()
    return (factor * torch.tensor(predicted, dtype=torch.float64)).tolist()


def test_random_effects_are_those_of_dersimonian_and_laird():
    """Their formulas in plain numbers: three studies, the second far from the others."""
    y, v = [0.1, 0.9, 0.2], [0.01, 0.04, 0.02]
    w = [100.0, 25.0, 50.0]
    mean = (10 + 22.5 + 10) / 175
    q = sum(wi * (yi - mean) ** 2 for wi, yi in zip(w, y, strict=True))
    tau2 = (q - 2) / (175 - (100**2 + 25**2 + 50**2) / 175)
    again = [1 / (vi + tau2) for vi in v]
    mu = sum(wi * yi for wi, yi in zip(again, y, strict=True)) / sum(again)
    found = random_effects(torch.tensor(y, dtype=torch.float64), torch.tensor(v, dtype=torch.float64))
    assert found[0].item() == pytest.approx(mu) and found[1].item() == pytest.approx(tau2) and tau2 > 0


def test_studies_that_agree_have_no_spread_between_them():
    mu, tau2 = random_effects(torch.tensor([0.3, 0.3]).double(), torch.tensor([0.1, 0.2]).double())
    assert mu.item() == pytest.approx(0.3) and tau2.item() == 0


def test_what_was_measured_on_every_sequence_is_what_was_measured():
    measured = {(0, 0): tally([0.08, 0.12]), (1, 0): tally([0.01, 0.03])}
    assert corrected([0.2, 0.04], measured, 2, 0.1) == pytest.approx([0.1, 0.02], rel=1e-6)


def test_a_bias_shared_by_all_reaches_what_was_not_measured():
    measured = {(i, 2 * i): tally([0.5 * kl * 0.9, 0.5 * kl * 1.1]) for i, kl in enumerate([0.02, 0.04, 0.1])}
    found = corrected([0.02, 0.04, 0.1, 0.06], measured, 6, 0.1)
    assert found == pytest.approx([0.01, 0.02, 0.05, 0.03], rel=1e-6)


def test_between_prediction_and_measurement_by_the_inverse_of_their_variances():
    """Two sync points, each measured on 2 of 4 sequences: solved with the formulas of the module's docstring."""
    kl, predicted, s = [[0.09, 0.11], [0.038, 0.042]], [0.1, 0.1], 0.1
    measured = {(0, 0): tally(kl[0]), (1, 2): tally(kl[1])}
    spread = [0.0002 / 0.1**2, 0.000008 / 0.04**2]  # variance of a sequence's KL over its square
    v = min(spread) * (1 - 2 / 4) / 2  # torch's median of two is the lower
    ratio = [math.log(0.1 / 0.1), math.log(0.04 / 0.1)]
    mu, tau2 = random_effects(torch.tensor(ratio).double(), torch.full((2,), v + s**2).double())
    own, prior = 1 / v, 1 / (s**2 + tau2.item())
    expected = [0.1 * math.exp((own * r + prior * mu.item()) / (own + prior)) for r in ratio]
    assert corrected(predicted, measured, 4, s) == pytest.approx(expected)
    assert 0.1 > expected[0] > 0.09 and 0.04 < expected[1] < 0.05


def test_hard_sequences_do_not_pass_for_a_hard_sync_point():
    measured = {(0, 0): tally([0.2, 0.18]), (1, 2): tally([0.021, 0.019])}
    hardness = [1.9, 1.9, 0.1, 0.1]
    assert corrected([0.1, 0.2], measured, 4, 0.1, hardness) == pytest.approx([0.1, 0.2], rel=0.02)


def test_a_broken_sync_point_is_what_it_measures_and_moves_no_other():
    fine = {(0, 0): tally([0.045, 0.055]), (1, 2): tally([0.02, 0.03])}
    without = corrected([0.05, 0.025, 9.0], fine, 8, 0.1)
    found = corrected([0.05, 0.025, 9.0], {**fine, (2, 4): tally([2.0, 3.0])}, 8, 0.1)
    assert found[:2] == without[:2] and found[2] == pytest.approx(2.5)


def test_rounding_tells_nothing():
    """A sync point that does nothing but for float32, measured at a thousand times what is predicted of it."""
    fine = {(0, 0): tally([0.045, 0.055]), (1, 2): tally([0.02, 0.03])}
    without = corrected([0.05, 0.025, 1e-12, 0.04], fine, 8, 0.1)
    found = corrected([0.05, 0.025, 1e-12, 0.04], {**fine, (2, 4): tally([1e-9, 9e-9])}, 8, 0.1)
    assert found == without and found[3] == pytest.approx(0.04, rel=0.1)


def test_of_a_sync_point_that_is_broken_and_was_not_measured_second_order_is_all_there_is():
    measured = {(i, 2 * i): tally([0.5 * kl * 0.9, 0.5 * kl * 1.1]) for i, kl in enumerate([0.02, 0.04])}
    assert corrected([0.02, 0.04, 0.9, 0.1], measured, 4, 0.1)[2:] == pytest.approx([0.9, 0.05])


def test_what_a_correction_leaves_unsure():
    """Of what was measured less than of what was not; nothing where all sequences were measured."""
    predicted = torch.tensor([0.1, 0.1, 0.1], dtype=torch.float64)
    tokens, q = torch.full((8,), 10.0).double(), predicted.expand(8, 3) * 10
    some = {(0, 0): tally([0.11, 0.09]), (1, 2): tally([0.03, 0.05])}
    left = factors(q, tokens, some, sampling_error=0.1)[1].tolist()
    assert 0 < left[0] < left[2] and left[0] == left[1] < 0.5 * (0.02 / 0.1) ** 2
    every = {(0, 0): tally([0.11, 0.09] * 4), (1, 0): tally([0.03, 0.05] * 4)}
    assert factors(q, tokens, every, sampling_error=0.1)[1][:2].tolist() == pytest.approx([0, 0], abs=1e-9)


def test_where_no_sync_point_can_be_dropped_that_is_said():
    lm = TensorParallelLM.simulated(tiny.build("llama", num_hidden_layers=1), 2)
    with pytest.raises(InputError, match="no such sync point to drop"):
        predict(lm, [[1, 2, 3, 4]], sync_points=["mlp"], target_stderr=0.5)


@pytest.mark.parametrize(
    "measured",
    [
        {},
        {(0, 0): tally([0.1, 0.2])},
        {(0, 0): tally([0.1]), (1, 1): tally([0.2])},
        {(0, 0): tally([0.0, 0.0]), (1, 2): tally([0.1, 0.2])},
        {(0, 0): tally([2.0, 3.0]), (1, 2): tally([0.1, 0.2])},
    ],
    ids=["nothing", "one point", "one sequence each", "a zero", "one of two broken"],
)
def test_too_little_to_tell_changes_nothing(measured):
    assert corrected([0.1, 0.2], measured, 4, 0.1) == [0.1, 0.2]


def test_a_sync_point_that_does_nothing_stays_nothing():
    measured = {(0, 0): tally([0.1, 0.2]), (1, 2): tally([0.1, 0.2]), (2, 0): tally([0.0, 1e-9])}
    assert corrected([0.15, 0.15, 0.0], measured, 4, 0.1)[2] == 0


def test_batches_of_one_sync_point_are_joined():
    found = joined({(3, 0): tally([0.1, 0.2]), (1, 0): tally([0.3]), (3, 4): tally([0.4])})
    assert {i: rows for i, (rows, _) in found.items()} == {3: [0, 1, 4], 1: [0]}
    assert found[3][1].tokens == [TOKENS] * 3 and found[3][1].kl() == pytest.approx(0.7 / 3)


def test_fisher_drops_every_sync_point_in_turn_and_says_what_it_cost():
    """Of seven sync points four on two batches, all of them on four, the eighth turn one of them again."""
    lm = TensorParallelLM.simulated(tiny.build("llama"), 4)
    sequences = [tiny.tokens(1, 12, seed=n)[0].tolist() for n in range(4)]
    half, whole = (
        predict(lm, sequences, sync_points=["attention", "mlp"], target_stderr=0.75, batch_size=n)[1] for n in (2, 1)
    )
    assert [m.sequences for m in half.measured] == [2] * 2 * DRAWS
    assert sorted(m.sequences for m in whole.measured) == [1] * 6 + [2]
    assert Fisher.model_validate_json(half.model_dump_json()) == half
