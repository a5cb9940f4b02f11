"""Budgets: as people ask for them, what a measured plan spends of one, and in words."""

import math

import pytest
from profiles import budget, comparison, make_profile

from spd_calib.errors import InputError
from spd_calib.planning import budget as budgets
from spd_calib.planning import budget_options

MEASURED = comparison(0.25).model_copy(
    update={
        "kl_stderr": 0.01, "ppl_increase": 0.5, "nll_increase_stderr": 0.02, "accuracy_drop": 0.125,
        "accuracy_drop_stderr": 0.03, "max_abs_logprob_diff": 7.0,
        "task_accuracy_drop": {"x": 0.25, "y": 0.75}, "task_accuracy_drop_stderr": {"x": 0.03, "y": 0.04},
    }
)  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "spent", "error", "words"),
    [
        ("max_kl", 0.25, 0.01, "KL 0.125"),
        ("max_ppl_increase", 0.5, 1.5 * 0.02, "perplexity +12.5 %"),
        ("max_accuracy_drop", 0.125, 0.03, "accuracy -12.5 points"),
        ("max_logprob_diff", 7.0, 0.0, "max |delta log p| 0.125"),
        ("min_speedup", 0.25, 0.01, "a step 12.5 % shorter"),
        ("drop", 0.25, 0.01, "0 sync points dropped"),
        ("tau", 0.25, 0.01, "tau1 0.125, tau2 0"),
    ],
)
def test_what_a_plan_spends_of_each_budget(kind, spent, error, words):
    b = budget(kind, 0.125)
    assert budgets.cost(b, MEASURED) == spent and budgets.stderr(b, MEASURED) == pytest.approx(error)
    assert budgets.describe(b) == words and budgets.describe(budget(kind, 3), 0.125) == words
    by_construction = kind in ("drop", "tau")
    assert budgets.kept(budget(kind, spent), MEASURED) and budgets.kept(budget(kind, 0), MEASURED) == by_construction
    enough = spent + 2 * error
    assert budgets.kept(budget(kind, enough + 1e-9), MEASURED, certain=True)
    assert budgets.kept(budget(kind, enough - 1e-9), MEASURED, certain=True) == by_construction


def test_a_budget_of_tasks_is_their_average():
    b = budget("max_accuracy_drop", 0.1, tasks=["x", "y"])
    assert budgets.cost(b, MEASURED) == 0.5 and budgets.stderr(b, MEASURED) == pytest.approx(0.025)
    assert budgets.describe(b) == "accuracy -10 points on x, y"
    assert budgets.describe(budget("tau", 0.5, tau2=0.75)) == "tau1 0.5, tau2 0.75"


def test_a_budget_on_each_text_is_the_costliest_texts():
    b = budget("max_kl", 0.25, each_text=True)
    texts = [comparison(kl).model_copy(update={"kl_stderr": error}) for kl, error in ((0.25, 0.0), (0.125, 0.1))]
    both = comparison(0.1875).model_copy(update={"per_text": texts})
    assert budgets.cost(b, both) == 0.25 and budgets.describe(b) == "on each text, KL 0.25"
    assert budgets.kept(b, both) and not budgets.kept(b, both, certain=True), "the second text's error is too large"
    assert not budgets.kept(b.model_copy(update={"value": 0.2}), both)
    sure = both.model_copy(update={"per_text": [t.model_copy(update={"kl_stderr": 0.0}) for t in texts]})
    assert budgets.kept(b, sure, certain=True)


def test_on_each_text_the_error_is_that_of_the_dearest_one():
    """The other text is cheap and noisy: its error says nothing of the dearest."""
    parts = [comparison(0.1), comparison(0.01).model_copy(update={"kl_stderr": 0.02})]
    both = comparison(0.055).model_copy(update={"per_text": parts, "kl_stderr": 0.01})
    assert budgets.stderr(budget(each_text=True), both) == 0.001 and budgets.stderr(budget(), both) == 0.01


@pytest.mark.parametrize(("text", "value"), [("1%", 0.01), ("0.05", 0.05), ("0", 0.0), ("150%", 1.5)])
def test_fractions(text, value):
    assert budget_options.fraction(text, "max_kl") == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "x", "-1%", "nan", "inf", "1%%", "-0.1"])
def test_fractions_that_are_none(text):
    with pytest.raises(InputError, match="max_kl"):
        budget_options.fraction(text, "max_kl")


@pytest.mark.parametrize(("text", "n"), [("5", 5), ("60%", 5), ("0%", 0), ("100%", 8), ("0", 0)])
def test_numbers_of_blocks(text, n):
    assert budget_options.number_of_drops(text, 8) == n


@pytest.mark.parametrize("text", ["9", "101%", "1.5", "-1", "all"])
def test_numbers_of_blocks_that_are_none(text):
    with pytest.raises(InputError, match="drop"):
        budget_options.number_of_drops(text, 8)


def test_shares_and_numbers_of_blocks_say_what_is_wrong():
    assert (
        budget_options.number_of_drops("50%", 4) == 2
        and budget_options.number_of_drops("100%", 4) == 4
        and budget_options.number_of_drops("4", 4) == 4
    )
    assert budget_options.fraction("100%", "x") == 1 and budget_options.fraction("2", "x") == 2
    for text, words in (
        ("101%", "`drop` 101% asks for more than the 4 blocks there are; ask for fewer."),
        ("5", "`drop` 5 asks for more than the 4 blocks there are; ask for fewer."),
        ("x%", "`drop` 'x%' is no budget; write a number such as 0.01, or 1%."),
        ("few", "`drop` 'few' is no number of blocks; write one such as 5, or a share such as 60%."),
    ):
        with pytest.raises(InputError) as e:
            budget_options.number_of_drops(text, 4)
        assert str(e.value) == words
    for text in ("inf", "-1%", "nan"):
        with pytest.raises(InputError, match="max_kl"):
            budget_options.fraction(text, "max_kl")


@pytest.mark.parametrize("sequences", [2, 3, 4, 8, 29])
def test_with_few_sequences_the_margin_is_students(sequences):
    """The same doubt as 2 standard errors of a normal value leave: found by bisection, on the t distribution's CDF."""
    from scipy import integrate, special

    degrees = sequences - 1
    scale = math.exp(special.gammaln((degrees + 1) / 2) - special.gammaln(degrees / 2)) / math.sqrt(degrees * math.pi)

    def density(x: float) -> float:
        return scale * (1 + x * x / degrees) ** (-(degrees + 1) / 2)

    above = 0.5 - integrate.quad(density, 0, budgets.margin(sequences), limit=500)[0]
    assert above == pytest.approx(math.erfc(2 / math.sqrt(2)) / 2, abs=1e-9)


def test_the_margin_of_many_and_of_one():
    assert budgets.margin(30) == budgets.margin(10**6) == 2 and budgets.margin(1) == math.inf
    assert 2 < budgets.margin(29) < budgets.margin(8) < budgets.margin(2) < math.inf


def test_what_is_spared_is_by_the_fewest_sequences_of_a_text_and_infinite_without_an_error():
    few = comparison(0.1).model_copy(update={"sequences": 5, "kl_stderr": 0.03})
    many = comparison(0.2).model_copy(update={"sequences": 500, "kl_stderr": 0.04})
    both = comparison(0.15).model_copy(update={"per_text": [many, few], "sequences": 505, "kl_stderr": 0.025})
    b = budget("max_kl", 1.0)
    assert budgets.spare(b, few, many) == pytest.approx(budgets.margin(5) * 0.05)
    assert budgets.spare(b, both) == pytest.approx(budgets.margin(5) * 0.025)
    one = few.model_copy(update={"sequences": 1, "kl_stderr": None, "nll_increase_stderr": None})
    assert budgets.spare(b, one) == budgets.spare(b, many, one) == math.inf
    assert budgets.kept(b, one) and not budgets.kept(b, one, certain=True)
    assert budgets.stderr(budget("max_ppl_increase", 1.0), one) is None
    assert budgets.spare(budget("max_logprob_diff", 1.0), one) == 0
    with_tasks = MEASURED.model_copy(update={"sequences": 5})
    assert budgets.spare(budget("max_accuracy_drop", 1.0, tasks=["x", "y"]), with_tasks) == pytest.approx(2 * 0.025)


@pytest.mark.parametrize("kind", ["max_kl", "max_ppl_increase", "max_accuracy_drop", "max_logprob_diff", "drop", "tau"])
def test_a_bound_wants_enough_sequences_of_every_text(kind):
    whole = make_profile([0.01, 0.02])
    b = budget(kind, 0.5, tau2=0.7 if kind == "tau" else None)
    budgets.check_enough_text(b, whole)
    for field, fewest, parameter in (("text", 4, "max_samples"), ("verify_text", 2, "verify_samples")):
        ref = getattr(whole, field)
        parts = [ref, ref.model_copy(update={"sequences": fewest - 1, "source": "short"})]
        for few in (parts[1], ref.model_copy(update={"parts": parts})):
            profile = whole.model_copy(update={field: few})
            enough = few.model_copy(update={"sequences": fewest, "parts": []})
            budgets.check_enough_text(b, whole.model_copy(update={field: enough}))
            if kind in ("max_logprob_diff", "drop", "tau"):
                budgets.check_enough_text(b, profile)
                continue
            with pytest.raises(
                InputError, match=f"wants {fewest} sequences to .*short has {fewest - 1}; .*{parameter}"
            ):
                budgets.check_enough_text(b, profile)
