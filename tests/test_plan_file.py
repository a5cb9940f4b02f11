"""make_plan: what stands in the plan file for a profile made by hand, and what is measured for it on the way."""

from types import SimpleNamespace

import pytest
import tiny
from test_planning import DROP, PLAIN, a, budget, comparison, m, make_profile
from test_planning_values import recovered

from spd_calib.errors import SpdError
from spd_calib.formats.common import Strategy
from spd_calib.formats.plan import CompensationFile, PlannedBlock
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.planning import latency
from spd_calib.planning import plan as planning
from spd_calib.planning.plan import HeldOutText, make_plan, measure_sets
from spd_calib.sensitivity.measure import Experiment, measure

KEEP = Strategy.KEEP_SYNC
COSTS = {a(0): 0.4, a(1): 0.1, a(2): 0.05, m(0): 0.02, m(1): 0.3}
LM = SimpleNamespace(module_paths=["layers.0", "layers.1", "layers.2"], num_blocks=3)
CALIBRATION, VERIFICATION = [[1, 2]] * 5, [[3, 4]] * 3


@pytest.fixture
def asked(monkeypatch) -> list:
    """What was measured: (sets, sequences, batch size, tick, dense). A set costs the sum of its parts, held out too."""
    calls: list = []

    def measured(lm, sets, sequences, batch_size, tick, dense=None):
        assert lm is LM
        calls.append((sets, sequences, batch_size, tick, dense))
        return [comparison(sum(COSTS[p] for p in drops)) for drops in sets]

    monkeypatch.setattr(planning, "measure_sets", measured)
    return calls


def profile(**changes):
    p = make_profile([COSTS[a(i)] for i in range(3)], [0.5, 0.2, 0.0501], mlp=[0.02, 0.3])
    return p.model_copy(update=changes)


def made(b, p=None, **options):
    p = p or profile()
    held_out = HeldOutText([VERIFICATION], p.verify_text)
    return make_plan(LM, p, b, [CALIBRATION], held_out, p.provenance, **options)  # type: ignore[arg-type]


def test_every_block_says_what_is_done_and_why(asked):
    plan, choice, compared = made(budget(value=0.2))
    assert compared == {} and plan.dropped == [1, 2] and plan.mlp_dropped == [0]
    assert {c.point for c in choice.dropped} == {a(1), a(2), m(0)}
    assert [b.model_dump(exclude={"compensation", "recovery"}) for b in plan.blocks] == [
        {"index": 0, "module": "layers.0", "strategy": KEEP, "mlp_strategy": DROP, "kl": 0.4, "mlp_kl": 0.02,
         "reason": "block_drop costs KL 0.4, beyond the budget; MLP: its sync joins the next one kept"},
        {"index": 1, "module": "layers.1", "strategy": DROP, "mlp_strategy": KEEP, "kl": 0.1, "mlp_kl": 0.3,
         "reason": "plain drop would cost KL 0.2; MLP: block_drop costs KL 0.3, beyond the budget"},
        {"index": 2, "module": "layers.2", "strategy": PLAIN, "mlp_strategy": KEEP, "kl": 0.0501, "mlp_kl": None,
         "reason": "plain drop measures no worse than block drop"},
    ]  # fmt: skip
    assert all(b.recovery is None and b.compensation is None for b in plan.blocks)
    p = profile()
    assert (plan.model, plan.tensor_parallel, plan.budget, plan.provenance, plan.requires) == (
        p.model, p.tensor_parallel, budget(value=0.2), p.provenance, ["mlp_drop"]
    )  # fmt: skip
    assert plan.verified.kl == pytest.approx(0.17) and plan.verified.text == p.verify_text
    assert plan.compensation is None and plan.recovered_from is None


FURTHER = HeldOutText(
    [[[5, 6]] * 3], make_profile([0.1]).verify_text.model_copy(update={"first": 8, "sha256": "8" * 64})
)


@pytest.mark.parametrize("more", [True, False])
def test_a_repaired_plan_is_verified_on_further_text(asked, monkeypatch, more):
    """On the text to verify on everything costs three times as much, on further text twice as much."""
    seen = []

    def measured(lm, sets, sequences, batch_size, tick, dense=None):
        seen.append(sequences)
        factor = {1: 1, 3: 3, 5: 2}[sequences[0][0]]
        return [comparison(factor * sum(COSTS[p] for p in drops)) for drops in sets]

    monkeypatch.setattr(planning, "measure_sets", measured)
    lots: list[int] = []

    def further(times):
        lots.append(times)
        return FURTHER if more else None

    plan, choice, _ = made(budget(value=0.2, strategies=[DROP]), further=further)
    assert choice.repaired and lots == [1] and plan.verified.seen == (not more)
    assert (plan.verified.text, seen[-1]) == (
        (FURTHER.ref, FURTHER.texts[0]) if more else (profile().verify_text, VERIFICATION)
    )
    assert ("seen" in plan.model_dump()["verified"]) == (not more) and plan.verified.lot == (1 if more else 0)
    whole, unbroken, _ = made(budget(value=9, strategies=[DROP]), further=further)
    assert not unbroken.repaired and lots == [1] and not whole.verified.seen


def test_what_the_profile_predicts_of_the_whole(asked):
    """KL: singles and what consecutive ones add; perplexity and accuracy add up, perplexity as a share of 10."""
    plan, _, _ = made(budget(value=0.2, strategies=[DROP]))
    assert plan.dropped == [1, 2] and plan.mlp_dropped == [0]
    assert plan.predicted.kl == pytest.approx(0.17 + 2 * (0.02 * 0.1) ** 0.5)
    assert plan.predicted.ppl_increase == pytest.approx((1 + 0.5 + 0.2) / 10)
    assert plan.predicted.accuracy_drop == pytest.approx(0.17 / 4)


def test_a_recovered_checkpoint_keeps_what_its_plan_drops(asked):
    """Its plan drops block 1's attention and block 0's MLP; what is predicted starts from what that costs."""
    old, _, _ = made(budget("drop", 2, [DROP]))
    alone = comparison(0.03).model_copy(update={"ppl": 10.5, "ppl_increase": 0.05, "accuracy_drop": 0.02})
    form = {"kind": "mean", "rank": 0}
    before = PlannedBlock.model_validate(
        {"index": 1, "module": "x", "strategy": DROP, "reason": "as it was", "compensation": form}
    )
    mlp = PlannedBlock(index=0, module="x", strategy=KEEP, mlp_strategy=DROP, reason="its MLP")
    other = PlannedBlock(index=2, module="x", strategy=KEEP, reason="not said")
    old = old.model_copy(update={"blocks": [mlp, before, other], "recovered_from": profile().model})
    p = profile(recovered=recovered([a(1), m(0)], alone))
    left = [r for r in p.measurements if (r.block, r.sync_point) not in ((1, "attention"), (0, "mlp"))]
    p = p.model_copy(update={"measurements": left})
    beside, dense = CompensationFile(file="c.safetensors", sha256="0" * 64), object()
    plan, choice, _ = made(budget("drop", 3, [DROP]), p, recovered=old, recovered_from=dense, compensation=beside)
    assert [c.point for c in choice.dropped] == [a(2)] and all(call[4] is dense for call in asked[-2:])
    assert [(b.strategy, b.mlp_strategy) for b in plan.blocks] == [(KEEP, DROP), (DROP, KEEP), (DROP, KEEP)]
    assert [b.reason for b in plan.blocks] == [
        "its MLP; block_drop costs KL 0.37, beyond the budget",
        "as it was; MLP: block_drop costs KL 0.27, beyond the budget",
        "the only strategy allowed",
    ]
    assert plan.requires == ["mlp_drop", "compensation"] and plan.compensation == beside
    assert plan.recovered_from == profile().model and plan.blocks[1].compensation.kind == "mean"
    assert plan.predicted.kl == pytest.approx(0.05)
    assert plan.predicted.ppl_increase == pytest.approx((10.5 - 10.5) / 10 + 0.05)
    assert plan.predicted.accuracy_drop == pytest.approx(0.05 / 4 - 0.02 + 0.02)


def test_blocks_that_were_not_profiled_say_so(asked):
    p = make_profile([0.1, 0.2]).model_copy(update={"model": profile().model})
    plan, _, _ = made(budget("drop", 1, [DROP]), p)
    assert [b.reason for b in plan.blocks] == [
        "block_drop costs KL 0.1, beyond the budget", "the only strategy allowed", "not profiled"
    ]  # fmt: skip
    assert plan.blocks[2].kl is None and plan.requires == []


def test_the_papers_thresholds_name_the_treatment(asked):
    """Perplexity sensitivities 4, 1 and 0.5."""
    plan, _, _ = made(budget("tau", 0.75, [DROP], tau2=2))
    assert [(b.strategy, b.recovery) for b in plan.blocks] == [
        (KEEP, "grouping+distillation"), (KEEP, "distillation"), (DROP, None)
    ]  # fmt: skip
    assert plan.blocks[0].reason == (
        "extremely sensitive: kept until `spd-calib recover` treats it (grouping+distillation)"
    )
    assert plan.blocks[1].reason == "sensitive: kept until `spd-calib recover` treats it (distillation)"


def test_what_is_measured_and_announced(asked):
    expected, tick = [], lambda experiment, tally: None
    made(budget(value=0.2), batch_size=2, tick=tick, expect=expected.append)
    assert {len(sequences) for _, sequences, *_ in asked} == {5, 3} and asked[-1][1] == VERIFICATION
    assert all((size, used, dense) == (2, tick, None) for _, _, size, used, dense in asked)
    assert expected == [len(sets) * (3 if sequences == CALIBRATION else 2) for sets, sequences, *_ in asked]
    assert not any(len(sets) != len({frozenset(s) for s in sets}) for sets, *_ in asked)
    made(budget(value=0.2))
    assert asked[-1][2] == 8 and asked[-1][3](0, None) is None


def test_the_obvious_sets_are_measured_once_and_compared(asked):
    plan, choice, compared = made(budget("drop", 2, [DROP]), compare=True)
    assert list(compared)[:3] == ["this plan", "the paper's back-to-front order", "the last"] and len(compared) == 9
    assert compared["this plan"] == choice.measured[frozenset([a(2), m(0)])]
    assert compared["the last"].kl == pytest.approx(COSTS[a(2)] + COSTS[a(1)])
    whole = [frozenset(s) for sets, sequences, *_ in asked if sequences == CALIBRATION for s in sets]
    cumulative = [frozenset([a(0), a(1), a(2)]), frozenset([a(1), a(2)]), frozenset([a(2)])]
    assert all(s in whole for s in cumulative)
    assert plan.verified.kl == min(m.kl for m in compared.values())
    _, _, nothing = made(budget("drop", 0, [DROP]), compare=True)
    assert nothing == {}


def test_an_accuracy_of_tasks_is_chosen_by_the_one_half_and_verified_by_the_other(asked, monkeypatch):
    """Block 1's attention costs most on the tasks; the loss is asked for with the strategies set, and only then."""
    state: list = []
    lm = SimpleNamespace(
        **vars(LM),
        set_strategies=lambda attention, mlp: state.append((attention, mlp)),
        keep_all=lambda: state.append(0),
    )
    monkeypatch.setattr("test_plan_file.LM", lm)
    halves = []

    def losing(name):
        def loss():
            attention, _ = state[-1]
            halves.append(name)
            return {"t": 0.5 if attention[1] != KEEP else 0.01}, {"t": 0.001}

        return loss

    b = budget("max_accuracy_drop", 0.1, [DROP], tasks=["t"])
    plan, _, _ = made(b, make_profile([0.4, 0.1, 0.05]), tasks=(losing("calibrate"), losing("verify")))
    assert 1 not in plan.dropped and plan.dropped and state[-1] == 0
    assert plan.verified.task_accuracy_drop == {"t": 0.01} and plan.verified.task_accuracy_drop_stderr == {"t": 0.001}
    assert halves[-1] == "verify" and "calibrate" in halves and state[1::2] == [0] * (len(state) // 2)


def test_a_budget_that_nothing_keeps_writes_no_plan(asked):
    with pytest.raises(SpdError, match=r"No sync point can be dropped within KL 0.001"):
        made(budget(value=0.001))


def test_measuring_sets_is_measuring_their_experiments():
    lm, ticks = TensorParallelLM.simulated(tiny.build("llama"), 2), []
    sequences = [tiny.tokens(1, 8, seed=n)[0].tolist() for n in range(3)]
    sets = [{a(1): DROP}, {a(0): PLAIN, m(2): DROP}]
    found = measure_sets(lm, sets, sequences, 2, lambda i, tally: ticks.append(i))
    experiments = [
        Experiment((KEEP, DROP, KEEP, KEEP), (KEEP,) * 4),
        Experiment((PLAIN, KEEP, KEEP, KEEP), (KEEP, KEEP, DROP, KEEP)),
    ]
    assert found == measure(lm, sequences, experiments, 2)[1] and ticks == [0, 1, 0, 1]
    other = TensorParallelLM.simulated(tiny.build("llama", seed=1), 2)
    assert measure_sets(lm, sets, sequences, 2, lambda i, tally: None, other)[0].kl > found[0].kl


def test_latency_as_it_stands_in_a_plan():
    step = latency.Step("prefill", 3, 7, 2)
    model = latency.LatencyModel("h", step, 4, compute=1.0, all_reduce=0.125)
    found = model.latency(3)
    assert found.model_dump() == {
        "hardware": "h", "phase": "prefill", "batch": 3, "context": 7, "all_reduce_seconds": 0.125,
        "dense_seconds": 2.0, "planned_seconds": 1.625, "saved": 0.1875, "ceiling": 7 * 0.0625,
    }  # fmt: skip
    with pytest.raises(SpdError) as e:
        model.drops_for(0.5, 3)
    assert str(e.value) == (
        "--min-speedup 50% is beyond what can be saved here: dropping all 3 sync points profiled saves 18.8 %, all 7 "
        "there are 43.8 % (prefill, batch 3, context 7, h); ask for less."
    )
    assert model.drops_for(0.1875, 3) == 3
