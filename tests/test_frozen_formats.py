"""The formats are frozen: a file that version 1 wrote is read by all that follow, with the same meaning.

tests/files/ holds one of each, as spd-calib 0.1.0 wrote it, and what came later beside them. Where a test here fails,
files that people have could no longer be read: give the new field a default, do not write the files anew. On the
shipped model they were made by

    spd-calib profile demo --tp 2 --data demo --seq-len 48 --max-samples 8 --verify-samples 8 \
        --sync-points attention,mlp -o profile.json
    spd-calib profile demo --tp 2 --data demo --seq-len 48 --max-samples 8 --verify-samples 8 --method fisher \
        --sync-points attention,mlp -o fisher.json
    spd-calib plan profile.json --drop 4 -o plan.json
    spd-calib bench plan.json --rounds 1 --tokens 8 --new-tokens 2 -o hardware.json
    spd-calib plan profile.json --max-ppl-increase 10% --hardware hardware.json --pareto pareto.json -o plan.json
    spd-calib eval plan.json --tasks demo --limit 2 -o results.json
    spd-calib plan profile.json --max-kl 0.1 --hardware hardware.json --new-tokens 1 --sync-bits any -o two_phases.json
    spd-calib recover plan.json --data demo --max-samples 64 --verify-samples 16 --methods grouping,compensation \
        --tau1 0 --tau2 0 -o recovered

The commands that profiled two texts (the second: sixty of the shipped held-out stories) and the recovered checkpoint
stand in the provenance of two_texts.json and recovered_profile.json.
"""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from spd_calib.formats.drops import Drops, Point, Strategy
from spd_calib.formats.files import FORMATS, read, schema
from spd_calib.formats.hardware import Hardware
from spd_calib.formats.pareto import Pareto
from spd_calib.formats.plan import Plan
from spd_calib.formats.profile import Profile
from spd_calib.formats.recovery import Recovery
from spd_calib.formats.results import Results
from spd_calib.models.plan_files import load_plan, load_plan_by_phase

FILES = Path(__file__).parent / "files"
KINDS = {
    "profile.json": Profile,
    "fisher.json": Profile,
    "two_texts.json": Profile,
    "recovered_profile.json": Profile,
    "plan.json": Plan,
    "recovered/plan.json": Plan,
    "recovered/recovery.json": Recovery,
    "two_phases.json": Plan,
    "results.json": Results,
    "hardware.json": Hardware,
    "pareto.json": Pareto,
}


def assert_holds(now: Any, then: Any, where: str = "") -> None:
    """Assert that all that stood in the file stands in what is read today, which may hold more fields."""
    if isinstance(then, dict):
        for key, value in then.items():
            assert key in now, f"{where}.{key} is gone"
            assert_holds(now[key], value, f"{where}.{key}")
    elif isinstance(then, list):
        assert len(now) == len(then), where
        for i, (a, b) in enumerate(zip(now, then, strict=True)):
            assert_holds(a, b, f"{where}[{i}]")
    else:
        assert now == then and type(now) is type(then), where


@pytest.mark.parametrize("name", KINDS)
def test_a_file_of_the_first_version_is_read_with_all_that_stands_in_it(name):
    document = read(KINDS[name], FILES / name)
    then = json.loads((FILES / name).read_text(encoding="utf-8"))
    assert_holds(document.model_dump(mode="json"), then)


@pytest.mark.parametrize("name", KINDS)
def test_a_file_of_the_first_version_is_valid_by_todays_schema(name):
    kind = next(name_of for name_of, kind in FORMATS.items() if kind is KINDS[name])
    jsonschema.validate(json.loads((FILES / name).read_text(encoding="utf-8")), json.loads(schema(kind)))


def test_one_of_each_format_is_kept():
    assert set(KINDS.values()) == set(FORMATS.values())
    assert {p.relative_to(FILES).as_posix() for p in FILES.rglob("*.json")} == set(KINDS)


def test_a_loss_is_noticed():
    """The comparison itself: a field that is gone, a value that changed its type or its size."""
    assert_holds({"a": 1, "new": 2}, {"a": 1})
    for now in ({}, {"a": 1.0}, {"a": True}, {"a": 2}, {"a": [1]}):
        with pytest.raises((AssertionError, TypeError)):
            assert_holds(now, {"a": 1})
    with pytest.raises(AssertionError):
        assert_holds([1, 2], [1])


def test_a_plan_of_the_first_version_means_the_same():
    plan, drops = load_plan(FILES / "plan.json")
    keep, drop = Strategy.KEEP_SYNC, Strategy.BLOCK_DROP
    assert drops == Drops.of_blocks([keep] + [drop] * 7, [keep] + [drop] * 6 + [keep])
    assert plan.tensor_parallel.size == 2 and plan.requires == ["mlp_drop"]
    assert (plan.budget.kind, plan.budget.value) == ("max_ppl_increase", 0.1)
    assert (plan.verified.reused, plan.verified.round) == (False, 0)  # fields that are written only where they say more


def test_a_plan_with_a_choice_for_each_phase_means_the_same():
    plan, phases = load_plan_by_phase(FILES / "two_phases.json")
    keep, drop = Strategy.KEEP_SYNC, Strategy.BLOCK_DROP
    bits = Drops.of_bits({Point(0, "attention"): 6, Point(7, "mlp"): 6})
    assert phases.prefill == Drops.of_blocks([keep] + [drop] * 7, [drop] * 7 + [keep]) | bits
    assert phases.decode == Drops.of_blocks([keep, *[drop] * 5, keep, drop], [keep, *[drop] * 6, keep])
    assert plan.requires == ["mlp_drop", "quantised_sync", "two_phases"] and plan.verified.as_served
    assert (plan.request.prompt, plan.request.new_tokens) == (8, 1)


def test_a_recovered_plan_of_the_first_version_has_its_predictors():
    plan, drops = load_plan(FILES / "recovered/plan.json")
    predictors = {p.block: drops.at(p).predictors for p in drops if drops.at(p).predictors is not None}
    assert plan.requires == ["mlp_drop", "compensation"] and plan.recovered_from.id == "demo"
    assert {block: (of_ranks[1].kind, of_ranks[1].rank) for block, of_ranks in predictors.items()} == {
        2: ("mean", 0), 3: ("low_rank", 8), 4: ("low_rank", 8), 6: ("low_rank", 4), 7: ("low_rank", 8)
    }  # fmt: skip
    assert all(set(of_ranks) == {0, 1} and of_ranks[0].bias.shape == (96,) for of_ranks in predictors.values())


def test_profiles_of_the_first_version_rank_the_same():
    single, fisher, two, recovered = (
        read(Profile, FILES / f"{name}.json") for name in ("profile", "fisher", "two_texts", "recovered_profile")
    )
    assert single.ranking("block_drop", "kl") == fisher.ranking("block_drop", "kl") == [2, 3, 4, 1, 5, 7, 6, 0]
    assert single.kl("block_drop")[0] == (0.581813812960615, 0.06562358825458571)
    assert fisher.kl("block_drop")[0] == (0.0311377, 0.00544919)
    assert two.ranking("block_drop", "kl") == [2, 4, 3, 1, 5, 7, 6, 0] and len(two.text.each) == 2
    assert recovered.settled[0] == Point(1, "attention") and len(recovered.settled) == 13
    assert recovered.kl("block_drop")[0] == (0.5113427887382832, None)  # a difference has none
