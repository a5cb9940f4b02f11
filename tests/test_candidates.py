"""Which sync points may go, in which way each would, and in which order they are ranked."""

import pytest
from profiles import DROP, PLAIN, a, budget, m, make_profile

from spd_calib.errors import InputError
from spd_calib.formats.drops import Strategy
from spd_calib.planning.candidates import candidates, tier


def test_plain_drop_only_where_it_measures_as_harmless():
    p = make_profile([0.010, 0.020, 0.030], [0.011, 0.080, 0.0321])
    found = {c.point.block: c.strategy for c in candidates(p, budget())}
    assert found == {0: PLAIN, 1: DROP, 2: DROP}


def test_a_strategy_that_was_not_profiled_cannot_be_planned():
    with pytest.raises(InputError, match="plain_drop"):
        candidates(make_profile([0.1]), budget(strategies=[PLAIN]))


def test_why_each_sync_point_is_dropped_that_way():
    p = make_profile([0.010, 0.020], [0.012, 0.080], mlp=[0.005])
    found = {c.point: c for c in candidates(p, budget())}
    assert {point: c.reason for point, c in found.items()} == {
        a(0): "plain drop measures no worse than block drop",
        a(1): "plain drop would cost KL 0.08",
        m(0): "its sync joins the next one kept",
    }
    assert found[a(0)].kl == 0.012 and found[a(1)].kl == 0.020 and found[m(0)].kl == 0.005
    alone = candidates(p, budget(strategies=[PLAIN]))
    assert [(c.point, c.kl, c.reason) for c in alone] == [
        (a(0), 0.012, "the only strategy allowed"), (a(1), 0.080, "the only strategy allowed")
    ]  # fmt: skip
    assert {c.point for c in candidates(p, budget("tau", tau2=1))} == {a(0), a(1)}


def test_candidates_say_what_was_not_profiled():
    p = make_profile([0.01], [0.02])
    only_mlp = p.model_copy(update={"measurements": make_profile([9, 9], mlp=[0.3]).measurements[2:]})
    assert [c.point for c in candidates(only_mlp, budget(strategies=[DROP]))] == [m(0)]
    for profile, strategies, words in (
        (make_profile([0.01]), [DROP, PLAIN],
         "The profile holds no measurement of plain_drop; profile again with the strategy plain_drop."),
        (only_mlp, [PLAIN],
         "The profile holds no measurement of plain_drop; profile again with the strategy plain_drop."),
        (p.model_copy(update={"measurements": list(p.of(PLAIN).values())}), [DROP],
         "The profile holds no measurement of block_drop; profile again with the strategy block_drop."),
        (p, [Strategy.KEEP_SYNC],
         "The strategy keep_sync alone leaves nothing to plan; allow block_drop or plain_drop."),
    ):  # fmt: skip
        with pytest.raises(InputError) as e:
            candidates(profile, budget(strategies=strategies))
        assert str(e.value) == words


def test_each_budget_ranks_by_its_own_metric():
    """Three blocks whose order differs by KL, by perplexity and by accuracy."""
    p = make_profile([0.1, 0.2, 0.3])
    rows = [
        r.model_copy(update={"ppl": ppl, "accuracy_drop": lost})
        for r, ppl, lost in zip(p.measurements, (12, 11, 13), (0.03, 0.02, 0.01), strict=True)
    ]

    def order(kind, rank_by="kl"):
        changed = p.model_copy(update={"measurements": rows, "rank_by": rank_by})
        return [c.point.block for c in candidates(changed, budget(kind, strategies=[DROP]))]

    assert order("max_kl") == order("max_logprob_diff", "ppl") == [0, 1, 2]
    assert order("max_ppl_increase") == order("tau") == [1, 0, 2]
    assert order("max_accuracy_drop") == [2, 1, 0]
    assert order("drop", "accuracy") == [2, 1, 0] and order("drop", "ppl") == [1, 0, 2]


def test_tokens_and_tasks_are_two_accuracies():
    """A budget of next tokens is ranked by these, though the profile was ranked by tasks."""
    p = make_profile([0.1, 0.2], rank_by="accuracy")
    rows = [
        r.model_copy(update={"accuracy_drop": tokens, "task_accuracy_drop": {"t": task}})
        for r, tokens, task in zip(p.measurements, (0.03, 0.01), (0.1, 0.2), strict=True)
    ]
    p = p.model_copy(update={"measurements": rows})
    of_tokens, drop = budget("max_accuracy_drop", strategies=[DROP]), budget("drop", strategies=[DROP])
    of_tasks = of_tokens.model_copy(update={"tasks": ["t"]})
    orders = [[c.point.block for c in candidates(p, b)] for b in (of_tokens, of_tasks, drop)]
    assert orders == [[1, 0], [0, 1], [0, 1]]
    assert p.sensitivity(DROP, "top1_accuracy") == {0: 0.03, 1: 0.01}


def test_few_sequences_do_not_speak_for_plain_drop():
    """Of three, a standard error says next to nothing: what measures worse is worse."""
    p = make_profile([0.010], [0.011])
    assert candidates(p, budget())[0].strategy == PLAIN
    few = p.model_copy(update={"text": p.text.model_copy(update={"sequences": 3})})
    assert candidates(few, budget())[0].strategy == DROP


def test_mlps_are_ranked_by_their_own_measurements():
    p = make_profile([0.3, 0.1], mlp=[0.2])
    assert [c.point for c in candidates(p, budget(strategies=[DROP]))] == [a(1), m(0), a(0)]


def test_tiers_hold_at_their_bounds():
    p = make_profile([0.125, 0.25, 0.5])  # perplexity 11.25, 12.5 and 15, from 10
    b = budget("tau", 1.25, [DROP], tau2=2.5)
    assert [tier(p, b, c) for c in candidates(p, b)] == ["insensitive", "sensitive", "extremely sensitive"]
    none = budget("tau", 1.25, [DROP])
    assert [tier(p, none, c) for c in candidates(p, none)] == ["insensitive", *["extremely sensitive"] * 2]


def test_a_cumulative_profile_can_be_planned_within_any_budget():
    """It holds no MLPs, which block_drop might also be used on."""
    p = make_profile([0.7, 0.4, 0.1], method="cumulative")
    assert [c.point for c in candidates(p, budget(strategies=[DROP]))] == [a(2), a(0), a(1)]
    assert candidates(p, budget(strategies=[DROP]))[0].kl == pytest.approx(0.1)
