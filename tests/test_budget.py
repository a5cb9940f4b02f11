"""Budgets: as people ask for them, what a measured plan spends of one, and in words."""

import math

import pytest
from profiles import DROP, a, budget, comparison, m, make_profile, recovered

from spd_calib.errors import InputError
from spd_calib.formats.plan import Budget
from spd_calib.planning import budget as budgets
from spd_calib.planning import budget_options
from spd_calib.planning.budget_options import BudgetOptions, budget_for

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
        ("min_speedup", 0.25, 0.01, "12.5 % of the time saved"),
        ("max_bytes", 0.25, 0.01, "12.5 % of the syncs' bytes"),
        ("drop", 0.25, 0.01, "0 sync points dropped"),
        ("tau", 0.25, 0.01, "tau1 0.125, tau2 0"),
    ],
)
def test_what_a_plan_spends_of_each_budget(kind, spent, error, words):
    b = budget(kind, 0.125)
    assert budgets.cost(b, MEASURED) == spent and budgets.stderr(b, MEASURED) == pytest.approx(error)
    assert budgets.describe(b) == words and budgets.describe(budget(kind, 3), 0.125) == words
    by_construction = kind in ("max_bytes", "drop", "tau")
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


NO_BOUND = ["max_logprob_diff", "min_speedup", "max_bytes", "drop", "tau"]


@pytest.mark.parametrize("kind", ["max_kl", "max_ppl_increase", "max_accuracy_drop", *NO_BOUND])
def test_a_bound_wants_enough_sequences_of_every_text(kind):
    whole = make_profile([0.01, 0.02])
    b = budget(kind, 0.5, tau2=0.7 if kind == "tau" else None)
    budgets.check_enough_text(b, whole)
    for field, fewest, what, parameter in (
        ("text", 4, "measure on", "max_samples"),
        ("verify_text", 2, "verify on", "verify_samples"),
    ):
        ref = getattr(whole, field)
        parts = [ref, ref.model_copy(update={"sequences": fewest - 1, "source": "short"})]
        for few in (parts[1], ref.model_copy(update={"parts": parts})):
            profile = whole.model_copy(update={field: few})
            enough = few.model_copy(update={"sequences": fewest, "parts": []})
            budgets.check_enough_text(b, whole.model_copy(update={field: enough}))
            if kind in NO_BOUND:
                budgets.check_enough_text(b, profile)
                continue
            with pytest.raises(
                InputError, match=f"wants {fewest} sequences to {what}, .*short has {fewest - 1}; .* larger {parameter}"
            ):
                budgets.check_enough_text(b, profile)


PROFILED = make_profile([0.1, 0.2, 0.3], [0.2, 0.3, 0.4], mlp=[0.05, 0.06])


def on_two_texts():
    """The same profile of two texts."""
    return PROFILED.model_copy(update={"text": PROFILED.text.model_copy(update={"parts": [PROFILED.text] * 2})})


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"max_kl": "5%"}, {"kind": "max_kl", "value": 0.05}),
        ({"max_bytes": 0.25}, {"kind": "max_bytes", "value": 0.25}),
        ({"drop": "60%"}, {"kind": "drop", "value": 3}),  # of three attentions and two MLPs
        ({"drop": 5}, {"kind": "drop", "value": 5}),
        ({"tau1": 1, "tau2": 1.5}, {"kind": "tau", "value": 1.0, "tau2": 1.5}),
        ({"tau1": 1, "tau2": 1}, {"kind": "tau", "value": 1.0, "tau2": 1}),
    ],
)
def test_the_budget_asked_for_is_the_one_of_a_plan(asked, expected):
    both = list(PROFILED.strategies)
    assert budget_for(PROFILED, BudgetOptions(**asked)) == Budget(**expected, strategies=both)
    one = budget_for(PROFILED, BudgetOptions(**asked, strategies=["block_drop", "block_drop"]))
    assert one == Budget(**expected, strategies=[DROP])


def test_a_budget_of_a_cost_may_hold_on_each_of_several_texts():
    for kind in ("max_kl", "max_ppl_increase", "max_accuracy_drop", "max_logprob_diff"):
        asked = BudgetOptions(**{kind: 0.5}, each_text=True)
        assert budget_for(on_two_texts(), asked) == budget(kind, 0.5, PROFILED.strategies, each_text=True)


NAMES = (
    "`max_kl`, `max_ppl_increase`, `max_accuracy_drop`, `max_logprob_diff`, `min_speedup`, `max_bytes`, `drop`, `tau1`"
)
NO_EACH = "`each_text` needs a budget of a cost, such as `max_kl`, and a profile of several texts; leave it out."


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({}, f"Give exactly one budget of {NAMES}; none is given."),
        ({"max_kl": 1, "drop": 2}, f"Give exactly one budget of {NAMES}; `max_kl` and `drop` are given."),
        ({"tau1": 1.0}, "`tau1` and `tau2` go together: the paper's rule has two thresholds."),
        ({"max_kl": 1, "tau2": 1.0}, "`tau1` and `tau2` go together: the paper's rule has two thresholds."),
        ({"tau1": 2.0, "tau2": 1.0}, "`tau2` 1.0 is below `tau1` 2.0; swap them."),
        ({"drop": 1, "each_text": True}, NO_EACH),
        ({"tau1": 1.0, "tau2": 2.0, "each_text": True}, NO_EACH),
        ({"min_speedup": 0.1, "each_text": True}, NO_EACH),
        ({"max_bytes": 0.1, "each_text": True}, NO_EACH),
        (
            {"max_kl": 1, "strategies": ["magic"]},
            "The strategy 'magic' is none of keep_sync, block_drop, plain_drop.",
        ),
        ({"drop": 6}, "`drop` 6 asks for more than the 5 sync points there are; ask for fewer."),
    ],
)
def test_what_is_no_budget_is_refused(asked, words):
    with pytest.raises(InputError) as e:
        budget_for(on_two_texts(), BudgetOptions(**asked))
    assert str(e.value) == words


def test_of_one_text_no_budget_holds_on_each():
    with pytest.raises(InputError) as e:
        budget_for(PROFILED, BudgetOptions(max_kl=1, each_text=True))
    assert str(e.value) == NO_EACH


def test_what_a_recovered_checkpoint_drops_is_counted_and_it_is_recovered_once():
    """Its plan dropped two sync points, of which its profile has no rows."""
    of_attentions = make_profile([0.1, 0.2]).model_copy(update={"recovered": recovered([a(2), a(3)], comparison(0.1))})
    of_both = PROFILED.model_copy(update={"recovered": recovered([m(2), a(3)], comparison(0.1))})
    assert budget_for(of_attentions, BudgetOptions(drop="50%")).value == 2
    for profile, what, all_of_them in ((of_attentions, "blocks", 4), (of_both, "sync points", 7)):
        assert budget_for(profile, BudgetOptions(drop=all_of_them)).value == all_of_them
        with pytest.raises(InputError) as e:
            budget_for(profile, BudgetOptions(drop=1))
        assert str(e.value) == f"`drop` 1 is less than the 2 {what} that the recovered checkpoint drops."
        with pytest.raises(InputError, match=f"more than the {all_of_them} {what} there are"):
            budget_for(profile, BudgetOptions(drop=all_of_them + 1))
        with pytest.raises(InputError) as e:
            budget_for(profile, BudgetOptions(tau1=1, tau2=2))
        assert str(e.value) == ("`tau1` says what to recover, and this checkpoint is recovered; give another budget.")
