"""Planning from Python: documents and paths in, a document out, and what the command adds to it."""

import shutil

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import spd_calib
from spd_calib import BudgetOptions, LatencyOptions, Progress
from spd_calib.errors import InputError, SpdError
from spd_calib.formats.files import dumps, read
from spd_calib.formats.plan import Plan
from spd_calib.formats.profile import Profile
from spd_calib.models.plan_files import load_plan
from spd_calib.parallel.quantised_sync import bytes_a_value

CPU = spd_calib.RunOptions(device="cpu")


def without_provenance(plan: Plan) -> str:
    return dumps(plan.model_copy(update={"provenance": None}))


@pytest.fixture(scope="module")
def profile(profile_file) -> Profile:
    return read(Profile, profile_file)


def test_the_command_and_the_call_make_the_same_plan(spd, profile_file, profile, tmp_path):
    run = spd("plan", profile_file, "--max-kl", "30%", "--compare", "-o", tmp_path / "plan.json", "--device", "cpu")
    assert run.code == 0, run.err
    written = read(Plan, tmp_path / "plan.json")
    expected = without_provenance(written)
    for given in (profile, profile_file, str(profile_file)):
        found = spd_calib.plan(given, max_kl=0.3, compare=True, run=CPU)
        assert without_provenance(found) == expected
    assert written.drops and written.provenance.dtype == "float32"


def test_what_else_was_found_comes_with_it(profile, tmp_path):
    steps, expected = [], []
    result = spd_calib.plan_with_details(
        profile,
        BudgetOptions(drop="50%", strategies=["block_drop"]),
        compare=True,
        run=CPU,
        progress=Progress(expect=expected.append, step=steps.append),
    )
    assert len(result.plan.drops) == 2 and result.given_back == 0 and result.predictors is None
    assert set(result.compared) >= {"this plan", "the last", "evenly spaced"}
    at_two = result.pareto.points[2]
    assert at_two.measured_kl is not None and result.compared["this plan"].kl <= at_two.measured_kl
    assert len(steps) == sum(expected) > 0
    result.write(tmp_path / "plan.json")
    assert read(Plan, tmp_path / "plan.json") == result.plan
    alone = spd_calib.pareto(profile, strategies=["block_drop"], run=CPU)
    assert [p.dropped for p in alone.points] == [p.dropped for p in result.pareto.points]
    assert all(p.measured_kl is None for p in alone.points)


def test_a_model_in_memory_and_one_that_moved_are_planned_for(profile, llama, tmp_path):
    expected = spd_calib.plan(profile, drop=2, run=CPU)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama), AutoTokenizer.from_pretrained(llama)
    in_memory = spd_calib.plan(profile, drop=2, model=model, tokenizer=tokenizer)
    assert without_provenance(in_memory) == without_provenance(expected)
    lost = profile.model_copy(update={"model": profile.model.model_copy(update={"id": str(tmp_path / "gone")})})
    with pytest.raises(InputError):
        spd_calib.plan(lost, drop=2, run=CPU)
    shutil.copytree(llama, tmp_path / "moved")
    moved = spd_calib.plan(lost, drop=2, model=tmp_path / "moved", run=CPU)
    assert moved.blocks == expected.blocks and moved.verified == expected.verified


def test_every_sync_that_is_kept_has_the_bits_asked_for(spd, profile, profile_file, tmp_path):
    """They are in whatever is measured, so the plan costs more than its drops; the file says so at each sync."""
    in_full = spd_calib.plan(profile, drop=2, run=CPU)
    run = spd("plan", profile_file, "--drop", 2, "--sync-bits", 4, "-o", tmp_path / "plan.json", "--device", "cpu")
    assert run.code == 0 and "keep_sync, 4 bits" in run.err, run.err
    plan, drops = load_plan(tmp_path / "plan.json")
    assert plan.requires == ["quantised_sync"] and len(drops) == 2
    assert all((bits == 4) == (strategy == "keep_sync") for b in plan.blocks for strategy, bits in b.syncs)
    assert plan.verified.kl > in_full.verified.kl and plan.predicted.kl > in_full.predicted.kl
    again = plan.model_copy(update={"requires": []}).model_dump(mode="json")
    with pytest.raises(ValueError, match="says nothing, its blocks need quantised_sync"):
        Plan.model_validate(again)
    again["blocks"][drops.points[0].block]["sync_bits"] = 8
    with pytest.raises(ValueError, match="only a sync that is kept can have bits"):
        Plan.model_validate(again | {"requires": ["quantised_sync"]})
    with pytest.raises(InputError, match="`sync_bits` 5 is none of 8, 6, 4, any"):
        spd_calib.plan(profile, drop=2, sync_bits=5, run=CPU)
    refused = spd("recover", tmp_path / "plan.json", "--data", "demo", "-o", tmp_path / "recovered")
    assert refused.code == 2 and "Recovery cannot fit weights through quantised syncs" in refused.err


def test_within_a_share_of_the_bytes_some_syncs_are_dropped_and_some_quantised(spd, profile, profile_file, tmp_path):
    run = spd("plan", profile_file, "--max-bytes", "30%", "-o", tmp_path / "plan.json", "--device", "cpu")
    assert run.code == 0 and "asked for: 30 % of the" in " ".join(run.err.split()), run.err
    plan, drops = load_plan(tmp_path / "plan.json")
    blocks = plan.model.num_blocks
    sent = sum(bytes_a_value(bits) for b in plan.blocks for s, bits in b.syncs if s == "keep_sync")
    assert 0 < sent <= 0.3 * 2 * blocks * 2
    assert drops.bits and plan.budget.kind == "max_bytes" and plan.predicted.ppl_increase is None
    said = f"{len(drops.bits)} of them quantised; {100 * sent / (4 * blocks):.0f} % of the bytes"
    assert said in " ".join(run.err.split()), run.err
    alike = spd_calib.plan(profile, drop=0, sync_bits=4, run=CPU)  # 27 % of the bytes
    assert plan.verified.kl < alike.verified.kl
    assert spd_calib.plan(profile, max_bytes=1.0, run=CPU).requires == []
    for more, error, what in (
        (
            {"max_bytes": "1%"},
            SpdError,
            "^1 % of the syncs' bytes: that is more than .* where 0.16 bytes a value are left for them",
        ),
        ({"max_kl": 1, "sync_bits": "any"}, InputError, "`sync_bits` any chooses bits for the time that they save"),
        ({"min_speedup": 0, "sync_bits": "any", "compare": True}, InputError, "leave `compare`, `replicate` out"),
        ({"max_bytes": "30%", "sync_bits": 8}, InputError, "leave `sync_bits`, `compare`, `replicate` out"),
    ):
        with pytest.raises(error, match=what):
            spd_calib.plan(profile, run=CPU, **more)


def test_the_command_is_told_where_the_model_is(spd, profile, llama, tmp_path):
    shutil.copytree(llama, tmp_path / "moved")
    lost = profile.model_copy(update={"model": profile.model.model_copy(update={"id": str(tmp_path / "gone")})})
    (tmp_path / "p.json").write_text(dumps(lost))
    given = ("plan", tmp_path / "p.json", "--drop", 1, "-o", tmp_path / "plan.json", "--device", "cpu")
    assert spd(*given).code == 2 and not (tmp_path / "plan.json").exists()
    run = spd(*given, "--model", tmp_path / "moved")
    assert run.code == 0 and len(read(Plan, tmp_path / "plan.json").drops) == 1, run.err


def test_a_share_of_time_to_save_is_a_number_of_drops(profile, tmp_path):
    cable = tmp_path / "cable.csv"
    cable.write_text("ranks,bytes,seconds,memory_bytes_per_second,flops_per_second\n4,1,1e-3,1e12,1e15\n")
    said: list[str] = []
    latency = LatencyOptions(str(cable), context=8)
    found = spd_calib.plan(profile, min_speedup="20%", latency=latency, run=CPU, progress=Progress(say=said.append))
    assert found.budget.kind == "min_speedup" and found.budget.value == 0.2
    decode, prefill = found.latency
    assert decode.saved >= 0.2 > decode.saved * (len(found.drops) - 1) / len(found.drops)
    assert (decode.phase, prefill.phase) == ("decode", "prefill")
    assert [words.split(":")[0] for words in said] == ["ceiling, decode", "ceiling, prefill"]
    saved = [p.saved["decode"] for p in spd_calib.pareto(profile, latency=latency, run=CPU).points]
    assert saved[len(found.drops)] == decode.saved and saved == sorted(saved)
    with pytest.raises(SpdError, match=r"`min_speedup` 90% is beyond what can be saved") as e:
        spd_calib.plan(profile, min_speedup=0.9, latency=latency, run=CPU)
    assert e.value.exit_code == 1


def test_a_share_of_time_is_saved_by_bits_and_drops_where_bytes_take_the_time(spd, profile, profile_file, tmp_path):
    """Over a link of 1 MB/s, where nothing else takes time: every sync at 8 bits saves nearly half of a prefill."""
    slow = tmp_path / "slow.csv"
    rows = [f"4,{b},{b / 1e6},1e15,1e18" for b in (1, 10**9)]
    slow.write_text("\n".join(["ranks,bytes,seconds,memory_bytes_per_second,flops_per_second", *rows]))
    latency = LatencyOptions(str(slow), context=8, phase="prefill")
    share = bytes_a_value(8) / 2
    alike = spd_calib.plan(profile, min_speedup=1 - share - 1e-4, sync_bits=8, latency=latency, run=CPU)
    assert len(alike.drops) == 0 and alike.latency[1].saved == pytest.approx(1 - share, abs=1e-3)
    assert alike.latency[1].quantised_seconds[8] == pytest.approx(share * alike.latency[1].all_reduce_seconds, rel=1e-3)
    further = spd_calib.plan(profile, min_speedup=1 - 0.8 * share, sync_bits=8, latency=latency, run=CPU)
    syncs = 2 * profile.model.num_blocks
    assert len(further.drops) == -(-syncs // 5), "a fifth of the syncs, at 8 bits"
    options = ("--hardware", slow, "--context", 8, "--phase", "prefill", "--min-speedup", "60%", "--sync-bits", "any")
    run = spd("plan", profile_file, *options, "-o", tmp_path / "plan.json", "--device", "cpu")
    assert run.code == 0 and "asked for: 60 % of the time saved" in " ".join(run.err.split()), run.err
    plan, drops = load_plan(tmp_path / "plan.json")
    _, prefill = plan.latency
    sent = sum(bytes_a_value(bits) for b in plan.blocks for s, bits in b.syncs if s == "keep_sync")
    assert prefill.saved == pytest.approx(1 - sent / (2 * syncs), abs=1e-3) and prefill.saved >= 0.6
    assert len(set(drops.bits.values()) | ({0} if len(drops) else set())) > 1, "treatments differ"
    assert any(f" us in place of {1e6 * prefill.all_reduce_seconds:.1f} us" in b.reason for b in plan.blocks)
    fewer = spd_calib.plan(profile, min_speedup="60%", sync_bits=4, latency=latency, run=CPU)
    assert plan.verified.kl < fewer.verified.kl
    points = spd_calib.plan_with_details(
        profile, BudgetOptions(drop=1), sync_bits=8, latency=latency, run=CPU
    ).pareto.points
    assert points[1].saved["prefill"] == pytest.approx(1 - share * (syncs - 1) / syncs, abs=1e-3)


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ({}, "Give exactly one budget of `max_kl`, `max_ppl_increase`, `max_accuracy_drop`, .*; none is given."),
        ({"max_kl": 1, "drop": 2}, "; `max_kl` and `drop` are given."),
        ({"tau1": 1.0}, "`tau1` and `tau2` go together"),
        ({"tau1": 2.0, "tau2": 1.0}, "`tau2` 1.0 is below `tau1` 2.0; swap them"),
        ({"max_kl": "little"}, "`max_kl` 'little' is no budget"),
        ({"drop": 0.5}, "`drop` '0.5' is no number of blocks"),
        ({"drop": 5}, "`drop` 5 asks for more than the 4 blocks there are"),
        ({"drop": 5, "strategies": ["plain_drop"]}, "`drop` 5 asks for more than the 4 "),
        ({"max_kl": 1, "each_text": True}, "`each_text` needs a budget of a cost"),
        ({"max_kl": 1, "strategies": ["magic"]}, "The strategy 'magic' is none of keep_sync"),
        ({"min_speedup": "1%"}, "`min_speedup` needs `hardware`"),
        ({"max_kl": 1, "tasks": spd_calib.TaskOptions(["x"])}, "`tasks` belongs to `max_accuracy_drop`"),
    ],
)
def test_errors_name_the_parameter(profile, budget, words):
    with pytest.raises(InputError, match=words):
        spd_calib.plan(profile, run=CPU, **budget)


def test_a_command_names_its_flags(spd, profile_file, tmp_path):
    for options, words in (
        ((), "one budget of --max-kl, --max-ppl-increase,"),
        (("--max-kl", "little"), "--max-kl 'little' is no budget; write a number such as 0.01, or 1%."),
        (("--max-kl", 1, "--strategy", "magic"), "strategy 'magic' is none of"),
        (("--drop", "9"), "--drop 9 asks for more than the 4 blocks there are"),
        (("--max-kl", 1e-9), "raise --max-kl."),
        (("--max-kl", 1, "--batch", 3), "--batch, --context and --new-tokens need --hardware"),
    ):
        run = spd("plan", profile_file, "-o", tmp_path / "plan.json", "--device", "cpu", *options)
        assert run.code != 0 and words in " ".join(run.err.split()), run.err
