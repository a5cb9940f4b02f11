"""profile.json: what it says of each sync point, and how it is read."""

import json

import pytest
from profiles import DROP, budget, chosen, comparison, fisher_profile, m, make_profile, random_fisher, recovered, total

from spd_calib.errors import InputError
from spd_calib.formats.files import dumps, read
from spd_calib.formats.profile import Profile


def test_sensitivity_of_cumulative_profiles_is_the_difference_of_consecutive_perplexities():
    p = make_profile([0.7, 0.4, 0.1], method="cumulative")
    assert p.sensitivity(DROP, "ppl") == pytest.approx({2: 1.0, 1: 3.0, 0: 3.0})  # points of perplexity, base 10
    assert p.sensitivity(DROP, "kl") == pytest.approx({2: 0.1, 1: 0.3, 0: 0.3})
    assert p.ranking(DROP, "ppl")[0] == 2


def test_ranking_by_accuracy_breaks_ties_by_kl():
    p = make_profile([0.3, 0.1, 0.2], rank_by="accuracy")
    rows = [m.model_copy(update={"accuracy_drop": 0.0}) for m in p.measurements]
    assert p.model_copy(update={"measurements": rows}).ranking(DROP) == [1, 2, 0]


def test_lm_eval_accuracy_ranks_where_there_is_some():
    p = make_profile([0.1, 0.2, 0.3], rank_by="accuracy")
    rows = [
        m.model_copy(update={"task_accuracy_drop": {"a": d, "b": d + 0.1}})
        for m, d in zip(p.measurements, (0.3, 0.1, 0.2), strict=True)
    ]
    p = p.model_copy(update={"measurements": rows})
    assert p.ranking(DROP) == [1, 2, 0]
    assert p.sensitivity(DROP)[0] == pytest.approx(0.35)


def test_predictions_know_kl_alone():
    p = fisher_profile(random_fisher(3, 0))
    assert p.strategies == [DROP] and p.sync_points == ["attention", "mlp"] and p.ranking(DROP) == p.ranking(DROP, "kl")
    with pytest.raises(InputError, match="KL alone"):
        p.sensitivity(DROP, "ppl")
    with pytest.raises(InputError, match="KL alone"):
        chosen(p, budget("tau", 0.1, [DROP], tau2=1.0), total([0] * 3), total([0] * 3))


def test_formats_round_trip_and_refuse_what_they_do_not_know(tmp_path):
    p = make_profile([0.1, 0.2], [0.3, 0.4])
    path = tmp_path / "p.json"
    path.write_text(dumps(p))
    assert read(Profile, path) == p
    good = json.loads(dumps(p))
    for change, word in [
        ({"version": 2}, "version 2"),
        ({"format": "spd-calib/plan"}, "not a profile"),
        ({"extra": 1}, "extra"),
        ({"method": "guess"}, "method"),
        ({"measurements": []}, "measurements"),
        ({"baseline": {**good["baseline"], "ppl": float("nan")}}, "baseline.ppl"),
        ({"measurements": [{**good["measurements"][0], "block": 7, "dropped": [7]}]}, "block 7"),
        ({"measurements": [{**good["measurements"][0], "kl": "0.1"}]}, "kl"),
    ]:
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(InputError, match=word):
            read(Profile, path)


def test_a_difference_of_two_measurements_has_no_standard_error():
    """That of either is none of what a drop adds: of the paper's cumulative order, and of a recovered checkpoint."""
    single = make_profile([0.3, 0.2])
    assert single.kl(DROP) == {0: (0.3, 0.001), 1: (0.2, 0.001)}
    for differences in (
        make_profile([0.3, 0.2], method="cumulative"),
        make_profile([0.3, 0.2], recovered=recovered([m(0)], comparison(0.1))),
    ):
        assert [stderr for _, stderr in differences.kl(DROP).values()] == [None, None]
