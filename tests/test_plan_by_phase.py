"""Planning for a whole request: one choice for prefill and one for decoding, or one for both where that is as good."""

import itertools
from pathlib import Path

import pytest
import tiny
from profiles import a, budget, comparison, make_profile

import spd_calib
from spd_calib import LatencyOptions, Progress
from spd_calib.api.plan_by_phase import check_can_be_served
from spd_calib.api.text import reload_texts
from spd_calib.errors import InputError, SpdError
from spd_calib.formats.drops import NOTHING_DROPPED, Drops, Strategy
from spd_calib.formats.files import dumps, read
from spd_calib.formats.phases import ByPhase
from spd_calib.formats.plan import Plan
from spd_calib.formats.profile import Profile
from spd_calib.models.plan_files import load_plan_by_phase
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.parallel.session import open_session
from spd_calib.planning.latency import LatencyModel, Step, Sync
from spd_calib.planning.two_phases import WORTH, RequestModel, choose_by_phase, single_choices
from spd_calib.sensitivity.measure import Subject
from spd_calib.sensitivity.served import measure_served

FILES = Path(__file__).parent / "files"
CPU = spd_calib.RunOptions(device="cpu")
ALONE = [0.01, 0.02, 0.04, 0.08, 0.3, 0.5]  # KL of each block's drop
PROFILE = make_profile(ALONE)


def cost(drops: Drops) -> float:
    return sum(ALONE[p.block] for p in drops) + 0.001 * len(drops.bits)


def served(plan: ByPhase) -> float:
    """What prefill drops costs a tenth, and a little more beside what decoding drops."""
    return cost(plan.decode) + 0.1 * cost(plan.prefill) + 0.02 * cost(plan.prefill) * cost(plan.decode)


def measure(plans, factor=1.0):
    return [comparison(factor * served(plan)) for plan in plans]


def request(*, prefill_sync: float, decode_sync: float, new_tokens: int) -> RequestModel:
    """Prefill takes 1 s beside its syncs, a decoded token 0.1 s. Eight bits halve a prefill's sync and no other."""

    def model(phase, compute, sync, at_eight):
        step = Step(phase, 1, 8, 2)
        return LatencyModel(
            phase, step, blocks=6, compute=compute, all_reduce=sync, quantised={8: Sync(kept=at_eight, left=0.0)}
        )

    models = {
        "prefill": model("prefill", 1.0, prefill_sync, prefill_sync / 2),
        "decode": model("decode", 0.1, decode_sync, 1.1 * decode_sync),
    }
    return RequestModel(models, new_tokens)


SLOW = {"prefill_sync": 0.5, "decode_sync": 0.02, "new_tokens": 8}  # the first token is most of it
FAST = {"prefill_sync": 0.001, "decode_sync": 0.02, "new_tokens": 1000}


def chosen(kind, value, model, *, bits=(None,), verify=None):
    asked = budget(kind, value, strategies=[Strategy.BLOCK_DROP])
    choices = single_choices(PROFILE, asked, bits=bits, num_blocks=6)
    verify = verify or (lambda plan, used_up: measure([plan])[0])
    return choose_by_phase(PROFILE, asked, choices, model, measure=measure, race=measure, verify=verify), choices


def test_the_choices_are_the_front_of_the_profile_with_each_number_of_bits():
    asked = budget("max_kl", 1, strategies=[Strategy.BLOCK_DROP])
    found = single_choices(PROFILE, asked, bits=[None, 8], num_blocks=6)
    assert len(found) == 2 * 7 and found[0] == NOTHING_DROPPED and NOTHING_DROPPED not in found[1:]
    assert {len(drops.bits) for drops in found} == {0, *range(6, 13)} and len(found[6]) == 6
    assert [p.block for p in found[3]] == [0, 1, 2]
    many = make_profile([0.01 * (1 + i) for i in range(40)])
    assert len(single_choices(many, asked, bits=[None], num_blocks=40)) == 13


@pytest.mark.parametrize("max_kl", [0.03, 0.06, 0.1, 0.4])
@pytest.mark.parametrize("link", [SLOW, FAST])
def test_within_a_kl_the_plan_is_the_fastest_there_is(max_kl, link):
    """Held against every pair; two standard errors must be left of the budget."""
    model = request(**link)
    found, choices = chosen("max_kl", max_kl, model, bits=(None, 8))
    pairs = [ByPhase(*pair) for pair in itertools.product(choices, choices)]
    within = [pair for pair in pairs if served(pair) + 2 * 0.001 <= max_kl]
    two, one = (min(map(model.seconds, some)) for some in (within, [p for p in within if p.one_choice]))
    assert model.seconds(found.one) == pytest.approx(one) and served(found.two) + 0.002 <= max_kl
    assert model.seconds(found.two) <= 1.03 * two
    assert found.plan == (found.one if 1 - model.seconds(found.two) / model.seconds(found.one) < WORTH else found.two)
    assert found.plan.one_choice == (link is FAST)


def test_over_a_slow_link_prefill_drops_more_than_decoding():
    found, _ = chosen("max_kl", 0.1, request(**SLOW))
    assert len(found.plan.prefill) > len(found.plan.decode)
    assert found.verified.kl == served(found.plan) and found.rounds == 0


@pytest.mark.parametrize("link", [SLOW, FAST])
def test_a_share_of_a_requests_time_is_saved_at_the_least_kl(link):
    model = request(**link)
    value = 0.25 if link is SLOW else 0.04
    found, choices = chosen("min_speedup", value, model)
    pairs = [ByPhase(*pair) for pair in itertools.product(choices, choices)]
    reaching = [pair for pair in pairs if model.saved(pair) >= value - 1e-9]
    one = min((p for p in reaching if p.one_choice), key=served)
    assert found.one == one and model.saved(found.plan) >= value - 1e-9
    if link is FAST:
        assert found.plan == one
    else:
        assert served(found.plan) == min(map(served, reaching)) < served(one) / 2


def test_more_than_a_request_can_save_is_refused_and_so_is_too_little_kl():
    with pytest.raises(SpdError, match=r"`min_speedup` 95% is beyond .* the fastest pair of choices saves"):
        chosen("min_speedup", 0.95, request(**SLOW))
    with pytest.raises(SpdError, match=r"Within KL 0.0001 neither one choice .* raise `max_kl`"):
        chosen("max_kl", 1e-4, request(**SLOW))


def test_where_held_out_text_breaks_the_budget_the_next_is_smaller_and_verified_further_on():
    rounds = []

    def verify(plan, used_up):
        rounds.append((used_up, served(plan)))
        return comparison(1.5 * served(plan))

    found, _ = chosen("max_kl", 0.1, request(**SLOW), verify=verify)
    assert [used_up for used_up, _ in rounds] == list(range(len(rounds))) and len(rounds) > 1
    assert found.rounds == len(rounds) - 1 and found.verified.kl <= 0.1 < 1.5 * rounds[0][1]


@pytest.fixture(scope="module")
def profile(profile_file) -> Profile:
    return read(Profile, profile_file)


def link(path, seconds: float, rate: float) -> str:
    """A table of one link: what any all-reduce takes and, beyond the bytes of a decoded token, the bytes a second."""
    rows = [f"4,{b},{seconds + max(b - 1024, 0) / rate},1e12,1e15" for b in (1, 1024, 10**9)]
    path.write_text("\n".join(["ranks,bytes,seconds,memory_bytes_per_second,flops_per_second", *rows]))
    return str(path)


def test_a_plan_in_two_phases_from_the_command_to_its_measurement(spd, profile, profile_file, llama, tmp_path):
    """Over a slow link, where the prompt's bytes take the time; verified is what a run of the file's plan measures."""
    slow, out = link(tmp_path / "slow.csv", 1e-5, 1e7), tmp_path / "plan.json"
    options = ("--hardware", slow, "--context", 64, "--new-tokens", 4, "--max-kl", 0.1, "--device", "cpu", "-o", out)
    run = spd("plan", profile_file, *options)
    said = " ".join(run.err.split())
    assert run.code == 0, run.err
    plan, phases = load_plan_by_phase(out)
    assert "so there are two" in said and f"check {out.name}" not in said and "--runtime torchrun" in said
    assert plan.requires[-1] == "two_phases" and plan.verified.as_served and plan.verified.kl <= 0.1
    assert len(phases.prefill) > len(phases.decode)
    assert (plan.request.prompt, plan.request.new_tokens) == (64, 4)
    prefill, decode = (next(m for m in plan.latency if m.phase == phase) for phase in ("prefill", "decode"))
    assert plan.request.planned_seconds == pytest.approx(prefill.planned_seconds + 3 * decode.planned_seconds)
    assert plan.request.two_choices_seconds < (1 - WORTH) * plan.request.one_choice_seconds
    block = next(b for b in plan.blocks if b.prefill)
    assert "block_drop in prefill, 0.0 us of" in block.reason and "; kept in decoding, " in block.reason
    session = open_session(str(llama), 4)
    texts = reload_texts(session, profile, path=profile_file)
    (found,) = measure_served(Subject(session.load()), texts[0].verification, plans=[phases])
    assert found.comparison().kl == pytest.approx(plan.verified.kl, rel=1e-4)
    again = spd("plan", profile_file, *options)
    assert again.code == 0 and read(Plan, out).blocks == plan.blocks
    assert spd("diff", out, out).code == 0
    assert "a choice for prefill and another" in spd("eval", out, "--tasks", "demo").err


def test_one_choice_is_written_where_a_second_is_not_worth_it(profile, tmp_path):
    """Many new tokens over a link whose delay is all: prefill is nothing beside them."""
    said: list[str] = []
    latency = LatencyOptions(link(tmp_path / "fast.csv", 1e-3, 1e12), context=8, new_tokens=1000)
    plan = spd_calib.plan(profile, max_kl=0.3, latency=latency, run=CPU, progress=Progress(say=said.append))
    assert not plan.in_two_phases and "two_phases" not in plan.requires and len(plan.drops) > 0
    assert plan.verified.as_served and plan.request.planned_seconds == plan.request.one_choice_seconds
    assert "less than 2 %, so one serves both phases" in said[-1]
    sure = spd_calib.plan(profile, min_speedup="20%", latency=latency, run=CPU)
    assert not sure.in_two_phases and sure.request.saved >= 0.2 and "request" in dumps(sure)


def test_bits_are_chosen_by_phase(profile, tmp_path):
    """Bytes take the time of prefill alone: its syncs have fewer bits, those of decoding have none."""
    latency = LatencyOptions(link(tmp_path / "slow.csv", 1e-3, 2e6), context=64, new_tokens=16)
    plan = spd_calib.plan(profile, min_speedup="25%", sync_bits="any", latency=latency, run=CPU)
    assert plan.by_phase.prefill.bits and not plan.by_phase.decode.bits and plan.request.saved >= 0.25
    assert {"two_phases", "quantised_sync"} <= set(plan.requires)
    eight = spd_calib.plan(profile, max_kl=0.2, sync_bits=8, latency=latency, run=CPU)
    assert set(eight.by_phase.prefill.bits.values()) == {8}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"drop": 2}, "`new_tokens` plans for a request, within `max_kl` or `min_speedup`"),
        ({"max_kl": 1, "compare": True}, "leave `tasks`, `each_text`, `compare`, `replicate` out"),
        ({"max_kl": 1, "replicate": "5%"}, "leave `tasks`, `each_text`, `compare`, `replicate` out"),
        ({"max_kl": 1, "latency": LatencyOptions("h100-nvlink", "prefill", new_tokens=4)}, "leave `phase` out"),
    ],
)
def test_what_does_not_go_with_a_request(profile, options, words):
    with pytest.raises(InputError, match=words):
        spd_calib.plan(profile, run=CPU, **{"latency": LatencyOptions("h100-nvlink", new_tokens=4), **options})


def test_a_model_whose_plans_hold_predictors_is_refused(profile):
    recovered = Profile.model_validate_json((FILES / "recovered_profile.json").read_text())
    plain, behind_norms = (Subject(TensorParallelLM.simulated(tiny.build(f), 2)) for f in ("llama", "gemma2"))
    check_can_be_served(profile, plain)
    with pytest.raises(InputError, match="this checkpoint is recovered: leave it out"):
        check_can_be_served(recovered, plain)
    with pytest.raises(InputError, match=r"branches go through a norm.*: leave `new_tokens` out"):
        check_can_be_served(profile, behind_norms)


def test_a_request_needs_hardware(spd, profile_file, tmp_path):
    run = spd("plan", profile_file, "--max-kl", 1, "--new-tokens", 4, "-o", tmp_path / "plan.json")
    assert run.code == 2 and "--new-tokens need --hardware" in " ".join(run.err.split())


def test_a_dropped_block_costs_most_in_decoding():
    """The test's own world: it would say nothing if both phases cost alike."""
    drops = Drops.of({a(4): Strategy.BLOCK_DROP})
    assert served(ByPhase(drops, NOTHING_DROPPED)) < served(ByPhase(NOTHING_DROPPED, drops)) / 5
