"""What a check of a runtime finds, from what the runtime did: without any runtime."""

import math

import plans
import pytest
import tiny
from transformers import AutoTokenizer

from spd_calib.api.check import check
from spd_calib.api.generate import generate
from spd_calib.api.options import RunOptions
from spd_calib.errors import InputError
from spd_calib.formats.drops import NOTHING_DROPPED, Drops
from spd_calib.models.plan_files import load_plan
from spd_calib.runtimes.checks import compare_counts, compare_logprobs, compare_run, largest_difference
from spd_calib.runtimes.observed import Observed
from spd_calib.runtimes.simulation import SimulatedRun
from spd_calib.runtimes.torchrun.check import compare_streams
from spd_calib.runtimes.vllm.rows import from_rows, to_rows

K, D, P = "keep_sync", "block_drop", "plain_drop"


@pytest.mark.parametrize(
    ("found", "ok"),
    [
        ([[-1.0, -2.0], [-3.0]], True),
        ([[-1.0, -2.0], [-3.09]], True),
        ([[-1.0, -2.0], [-3.11]], False),
        ([[-1.0, math.nan], [-3.0]], False),
        ([[-1.0, -math.inf], [-3.0]], False),
        ([[-1.0], [-3.0]], False),
        ([[-1.0, -2.0]], False),
    ],
)
def test_log_probabilities(found, ok):
    assert compare_logprobs("a", [[-1.0, -2.0], [-3.0]], found=found, tolerance=0.1).ok == ok


def test_largest_difference():
    assert largest_difference([[1.0], [2.0, 4.0]], [[1.5], [2.0, 3.0]]) == 1.0
    assert largest_difference([], []) == 0.0


@pytest.mark.parametrize(
    ("found", "shown", "ok"), [([3, 3], "3", True), ([3, 4], "3, 4", False), ([], "nothing counted", False)]
)
def test_counts(found, shown, ok):
    row = compare_counts("a", 3, found=found)
    assert (row.expected, row.found, row.ok) == ("3", shown, ok)


def test_a_run_is_held_against_its_simulation():
    simulated = SimulatedRun(prompt=[[-1.0]], chosen=[[-0.5]], best=[[-0.5]])
    good = Observed(prompt=[[-1.0]], tokens=[[7]], chosen=[[-0.5]], all_reduces=[])

    def wrong(observed, *, simulated):
        rows = compare_run("plan", observed, simulated=simulated, tolerance=0.1)
        return [row.what.removeprefix("plan: ") for row in rows if not row.ok]

    assert wrong(good, simulated=simulated) == []
    for field, value, what in (
        ("prompt", [[-2.0]], "prompt tokens"),
        ("chosen", [[-2.0]], "greedy continuation"),
    ):
        assert wrong(good.model_copy(update={field: value}), simulated=simulated) == [what]
    likelier = SimulatedRun(prompt=[[-1.0]], chosen=[[-0.5]], best=[[-0.2]])
    assert wrong(good, simulated=likelier) == ["its tokens are the likeliest"]


@pytest.mark.parametrize(
    ("attention", "mine", "other", "expected", "found", "ok"),
    [
        ([K, D, D], "abc", "abc", "bit-equal after every block", "bit-equal after every block", True),
        ([K, D, D], "abc", "abd", "bit-equal after every block", "differ from block 2 on", False),
        ([K, P, D], "abc", "ade", "bit-equal up to the plain drop in block 1", "differ from block 1 on", True),
        ([K, P, D], "abc", "fde", "bit-equal up to the plain drop in block 1", "differ from block 0 on", False),
        ([K, D, D], "ab", "ab", "bit-equal after every block", "bit-equal after every block", False),
    ],
)
def test_streams_of_the_ranks(attention, mine, other, expected, found, ok):
    row = compare_streams("a", [list(mine), list(other)], drops=Drops.of_blocks(attention), num_blocks=3)
    assert (row.expected, row.found, row.ok) == (expected, found, ok)


def test_what_overflowed_on_a_rank_is_told_to_the_check():
    said = Observed(prompt=[[math.nan, -math.inf]], tokens=[[1]], chosen=[[0.0]], all_reduces=[[1]])
    read = Observed.model_validate_json(said.model_dump_json())
    assert math.isnan(read.prompt[0][0]) and read.prompt[0][1] == -math.inf


@pytest.mark.parametrize("drops", [NOTHING_DROPPED, Drops.of_blocks([D, P, K, D], [K, D, D, K])])
def test_drops_as_rows(drops):
    assert from_rows(to_rows(drops)) == drops
    assert len(to_rows(drops)) == len(drops)


def test_check_and_generate_take_a_model_in_memory(llama, tmp_path):
    path = plans.write_plan(tmp_path / "plan.json", llama, 4, [D, K, D, D], [K, D, K, K])
    plan, _ = load_plan(path)
    model, tokenizer = tiny.build("llama"), AutoTokenizer.from_pretrained(llama)
    result = check(plan, model=model, tokenizer=tokenizer)
    assert result.ok and result.rows == check(path).rows
    run = RunOptions(device="cpu")
    in_memory = generate(plan, ["the cat"], model=model, tokenizer=tokenizer, new_tokens=8, dense=True, run=run)
    assert in_memory == generate(path, ["the cat"], new_tokens=8, dense=True, run=run)
    assert [row.model for row in in_memory] == ["dense", "plan"]
    with pytest.raises(InputError, match="give the path of the plan"):
        check(plan, model=model, tokenizer=tokenizer, runtime="torchrun")
    with pytest.raises(InputError, match="one in memory cannot be checked there"):
        check(path, model=model, tokenizer=tokenizer, runtime="torchrun")


def test_predictors_need_the_file_of_the_plan(llama, tmp_path):
    path = plans.write_plan(tmp_path / "plan.json", llama, 4, [D, K, D, D], kinds=["mean", None, None, None])
    with pytest.raises(InputError, match="give the path of the plan's file"):
        check(load_plan(path)[0])
