"""The standard error of a mean per token, against the formula in plain numbers and against repeated sampling."""

import math
import random
import statistics

import pytest
import torch

from spd_calib.sensitivity.standard_error import ratio_and_stderr


def test_the_formula_in_plain_numbers():
    sums, tokens = [3.0, 1.0, 8.0], [2.0, 4.0, 3.0]
    ratio = 12 / 9
    squares = sum((s - ratio * n) ** 2 for s, n in zip(sums, tokens, strict=True))
    mean, stderr = ratio_and_stderr(torch.tensor(sums).double(), torch.tensor(tokens).double())
    assert mean.item() == pytest.approx(ratio) and stderr.item() == pytest.approx(math.sqrt(3 / 2 * squares) / 9)


def test_of_equal_lengths_it_is_the_error_of_the_sequences_means():
    values = [0.3, 0.7, 0.2, 0.9]
    mean, stderr = ratio_and_stderr(torch.tensor(values).double() * 5, torch.full((4,), 5.0).double())
    assert mean.item() == pytest.approx(statistics.mean(values))
    assert stderr.item() == pytest.approx(statistics.stdev(values) / 2)


def test_of_many_quantities_at_once_each_is_as_alone():
    sums = torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens = torch.tensor([4.0, 6.0, 4.0, 5.0, 4.0, 9.0], dtype=torch.float64)
    mean, stderr = ratio_and_stderr(sums, tokens)
    assert mean.shape == stderr.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            alone = ratio_and_stderr(sums[:, i, j], tokens)
            assert (mean[i, j].item(), stderr[i, j].item()) == pytest.approx([x.item() for x in alone])


def test_one_sequence_alone_has_no_error():
    mean, stderr = ratio_and_stderr(torch.tensor([3.0]).double(), torch.tensor([2.0]).double())
    assert mean.item() == 1.5 and stderr is None


def test_it_is_the_spread_of_the_mean_over_texts_drawn_anew():
    """Sequences of unequal lengths whose tokens hang together: the error says how much the mean varies, to 10 %."""
    dice = random.Random(0)

    def text() -> tuple[list[float], list[float]]:
        tokens = [float(dice.randint(5, 30)) for _ in range(40)]
        return [n * dice.gauss(1.0, 0.5) for n in tokens], tokens

    found = [ratio_and_stderr(*(torch.tensor(x).double() for x in text())) for _ in range(500)]
    spread = statistics.stdev(mean.item() for mean, _ in found)
    assert statistics.mean(stderr.item() for _, stderr in found) == pytest.approx(spread, rel=0.1)
