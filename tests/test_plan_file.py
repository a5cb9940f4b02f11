"""make_plan: what stands in the plan file for a profile made by hand, and what is measured for it on the way."""

from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import tiny
from profiles import DROP, PLAIN, a, budget, comparison, fisher_profile, m, make_profile, random_fisher, recovered

from spd_calib.errors import SpdError
from spd_calib.formats.drops import NOTHING_DROPPED, Drop, Drops, Strategy
from spd_calib.formats.plan import CompensationFile, PlannedBlock, RouterPredictor
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.planning import plan as planning
from spd_calib.planning import whole_plans
from spd_calib.planning.replication import Replicated
from spd_calib.planning.sync_bits import limit_of_bytes
from spd_calib.planning.whole_plans import Calibration, HeldOut, Round, measure_plans
from spd_calib.sensitivity.measure import Subject, measure

KEEP = Strategy.KEEP_SYNC
COSTS = {a(0): 0.4, a(1): 0.1, a(2): 0.05, m(0): 0.02, m(1): 0.3}
MODULES = ["layers.0", "layers.1", "layers.2"]
LM = SimpleNamespace()
CALIBRATION, VERIFICATION = [[1, 2]] * 5, [[3, 4]] * 3


@pytest.fixture
def asked(monkeypatch) -> list:
    """What was measured: (plans, sequences, batch size, tick, dense). A plan costs the sum of its parts on any text."""
    calls: list = []

    def measured(subject, sequences, *, plans, batch_size, tick):
        assert subject.lm is LM
        calls.append((plans, sequences, batch_size, tick, subject.original))
        return None, [comparison(sum(COSTS[p] for p in drops)) for drops in plans]

    monkeypatch.setattr(whole_plans, "measure", measured)
    return calls


def profile(**changes):
    p = make_profile([COSTS[a(i)] for i in range(3)], [0.5, 0.2, 0.0501], mlp=[0.02, 0.3])
    return p.model_copy(update=changes)


def made(b, p=None, *, more=(), losses=None, lm=LM, original=None, modules=MODULES, measuring=None, **options):
    """The plan, the choice and the comparison for a budget; `more` rounds of held-out text follow the first."""
    p = p or profile()
    run = partial(measure_plans, subject=Subject(lm, original=original), **(measuring or {}))
    chosen_by, verified_by = losses or (None, None)
    calibration = Calibration(partial(run, texts=[CALIBRATION], task_loss=chosen_by))
    rounds = [Round([VERIFICATION], p.verify_text), *more]
    held_out = HeldOut(rounds, measure=partial(run, task_loss=verified_by), same_documents=losses is not None)
    planned = planning.make_plan(
        p,
        b,
        calibration=calibration,
        held_out=held_out,
        module_paths=modules,
        provenance=p.provenance,
        **options,
    )
    return planned.plan, planned.choice, planned.compared


def test_every_block_says_what_is_done_and_why(asked):
    plan, choice, compared = made(budget(value=0.2))
    assert compared == {} and plan.drops.blocks("attention") == [1, 2] and plan.drops.blocks("mlp") == [0]
    assert set(choice.drops) == {a(1), a(2), m(0)}
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


FURTHER = Round([[[5, 6]] * 3], make_profile([0.1]).verify_text.model_copy(update={"first": 8, "sha256": "8" * 64}))


@pytest.mark.parametrize("more", [True, False])
def test_a_repaired_plan_is_verified_on_further_text(monkeypatch, more):
    """On the text to verify on everything costs three times as much, on further text twice as much."""
    seen = []

    def measured(subject, sequences, *, plans, batch_size, tick):
        seen.append(sequences)
        factor = {1: 1, 3: 3, 5: 2}[sequences[0][0]]
        return None, [comparison(factor * sum(COSTS[p] for p in drops)) for drops in plans]

    monkeypatch.setattr(whole_plans, "measure", measured)
    yielded: list[Round] = []

    def further():
        for following in [FURTHER] if more else []:
            yielded.append(following)
            yield following

    plan, choice, _ = made(budget(value=0.2, strategies=[DROP]), more=further())
    assert choice.given_back and choice.rounds == 1 and plan.verified.reused == (not more)
    assert (plan.verified.text, seen[-1]) == (
        (FURTHER.ref, FURTHER.texts[0]) if more else (profile().verify_text, VERIFICATION)
    )
    assert ("reused" in plan.model_dump()["verified"]) == (not more) and plan.verified.round == (1 if more else 0)
    yielded.clear()
    whole, unbroken, _ = made(budget(value=9, strategies=[DROP]), more=further())
    assert not unbroken.given_back and not whole.verified.reused and "round" not in whole.model_dump()["verified"]


def test_held_out_text_is_read_as_it_is_needed_and_used_again_at_its_end():
    read = []

    def rounds():
        for i in range(2):
            read.append(i)
            yield Round([[[i]]], SimpleNamespace(first=i))

    held_out = HeldOut(rounds(), measure=lambda plans, texts: [texts])
    assert held_out.after(0)[0] == 0 and read == [0]
    assert held_out.verify(NOTHING_DROPPED, 1) == [[[1]]] and read == [0, 1] and not held_out.reused(1)
    assert held_out.after(3)[0] == 1 and held_out.reused(2) and not held_out.reused(0)
    tasks = HeldOut(rounds(), measure=lambda plans, texts: [texts], same_documents=True)
    assert tasks.reused(1) and not tasks.reused(0)


def test_what_the_profile_predicts_of_the_whole(asked):
    """KL: singles and what consecutive ones add; perplexity and accuracy add up, perplexity as a share of 10."""
    plan, _, _ = made(budget(value=0.2, strategies=[DROP]))
    assert plan.drops.blocks("attention") == [1, 2] and plan.drops.blocks("mlp") == [0]
    assert plan.predicted.kl == pytest.approx(0.17 + 2 * (0.02 * 0.1) ** 0.5)
    assert plan.predicted.ppl_increase == pytest.approx((1 + 0.5 + 0.2) / 10)
    assert plan.predicted.accuracy_drop == pytest.approx(0.17 / 4)


def quantising(monkeypatch) -> None:
    """A plan then costs the sum of its drops, and for each sync of 4 bits 0.01, of 8 bits 17 squared times less."""

    def measured(subject, sequences, *, plans, batch_size, tick):
        of_bits = [sum(0.01 * (15 / (2**bits - 1)) ** 2 for bits in drops.bits.values()) for drops in plans]
        return None, [comparison(sum(COSTS[p] for p in drops) + kl) for drops, kl in zip(plans, of_bits, strict=True)]

    monkeypatch.setattr(whole_plans, "measure", measured)


def test_what_quantised_syncs_cost_is_predicted_with_the_drops(monkeypatch):
    """Perplexity and accuracy of a profile that is not Fisher's are theirs, too."""
    quantising(monkeypatch)
    bits = Drops.of_bits({a(0): 8, m(2): 4})

    def with_bits(sets, texts):
        return measure_plans([bits | drops for drops in sets], texts, subject=Subject(LM))

    planned = planning.make_plan(
        profile(),
        budget("drop", 1, [DROP]),
        calibration=Calibration(partial(with_bits, texts=[CALIBRATION])),
        held_out=HeldOut([Round([VERIFICATION], profile().verify_text)], measure=with_bits),
        module_paths=MODULES,
        provenance=profile().provenance,
        quantised=bits,
    )
    assert list(planned.choice.drops) == [m(0)]
    assert [(b.sync_bits, b.mlp_sync_bits) for b in planned.plan.blocks] == [(8, None), (None, None), (None, 4)]
    found = planned.plan.predicted
    kl = 0.02 + 0.01 + 0.01 / 17**2
    assert planned.plan.requires == ["mlp_drop", "quantised_sync"] and found.kl == pytest.approx(kl)
    assert found.ppl_increase == pytest.approx(kl) and found.accuracy_drop == pytest.approx(kl / 4)


def test_a_share_of_the_bytes_is_kept_by_bits_and_drops(monkeypatch):
    """Of 6 syncs 30 % are left: as much as 1.8 whole ones."""
    quantising(monkeypatch)
    plan, choice, _ = made(
        budget("max_bytes", 0.3, [DROP]), limit=limit_of_bytes(0.3, num_blocks=3, side_by_side=False)
    )
    sent = [
        0 if strategy == DROP else (bits or 16) / 8 + (3 / 64 if bits else 0)
        for b in plan.blocks
        for strategy, bits in ((b.strategy, b.sync_bits), (b.mlp_strategy, b.mlp_sync_bits))
    ]
    assert sum(sent) <= 0.3 * 6 * 2 and choice.drops.bits and "quantised_sync" in plan.requires
    assert plan.drops.bits == choice.drops.bits and plan.verified.kl == pytest.approx(plan.predicted.kl)


def test_blocks_with_replicated_heads_are_dropped_and_counted_whatever_else_is(asked):
    """Of two drops one is block 0's attention, which alone would cost most; the cheapest other one is chosen."""
    groups = ((1,), (0,))
    given = Replicated(Drops({a(0): Drop(DROP, replicated=groups)}), {0: "its heads are replicated"})
    plan, choice, _ = made(budget("drop", 2, [DROP]), replicated=given)
    assert list(choice.drops) == [m(0)] and list(plan.drops) == [a(0), m(0)] and plan.budget.value == 2
    assert plan.drops.replicated == {0: groups} and plan.requires == ["mlp_drop", "replicated_heads"]
    assert plan.blocks[0].reason.startswith("its heads are replicated")
    plan, choice, _ = made(budget(value=0.2), replicated=given)  # a budget that is no number of drops stays as it is
    assert set(choice.drops) == {a(1), a(2), m(0)} and set(plan.drops) == {a(0), a(1), a(2), m(0)}


def test_routers_of_dropped_mixtures_read_what_the_plan_of_the_recovered_checkpoint_says(asked):
    """Blocks 1 and 2 are mixtures; of the first that plan has a predictor, of the second none."""
    mixtures = {"mixtures": [1, 2]}
    zero, fitted = RouterPredictor(kind="zero", rank=0), RouterPredictor(kind="low_rank", rank=3)
    fresh, _, _ = made(budget("drop", 2, [DROP]), make_profile([0.4, 0.1, 0.05]), **mixtures)
    assert [b.router for b in fresh.blocks] == [None, zero, zero] and fresh.requires == ["router_predictor"]
    kept, _, _ = made(budget("drop", 1, [DROP]), make_profile([0.4, 0.1, 0.05]), **mixtures)
    assert [b.router for b in kept.blocks] == [None, None, zero]
    old = fresh.model_copy(
        update={"blocks": [b.model_copy(update={"router": fitted if b.index == 1 else None}) for b in fresh.blocks]}
    )
    p = make_profile([0.4]).model_copy(
        update={"model": profile().model, "recovered": recovered([a(1), a(2)], comparison(0.0))}
    )
    beside = CompensationFile(file="c.safetensors", sha256="0" * 64)
    again, _, _ = made(budget("drop", 3, [DROP]), p, recovered=old, predictors=beside, **mixtures)
    assert [b.router for b in again.blocks] == [None, fitted, zero]


def test_predictions_of_fisher_are_kl_alone():
    predicted = planning._predicted(fisher_profile(random_fisher(3, 1)), [], kl=0.125, of_others=None, only_kl=False)
    assert (predicted.kl, predicted.ppl_increase, predicted.accuracy_drop) == (0.125, None, None)


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
    plan, choice, _ = made(budget("drop", 3, [DROP]), p, recovered=old, original=dense, predictors=beside)
    assert list(choice.drops) == [a(2)] and all(call[4] is dense for call in asked[-2:])
    assert [(b.strategy, b.mlp_strategy) for b in plan.blocks] == [(KEEP, DROP), (DROP, KEEP), (DROP, KEEP)]
    assert [b.reason for b in plan.blocks] == [
        "its MLP; block_drop costs KL 0.37, and the budget has no room for it",
        "as it was; MLP: block_drop costs KL 0.27, and the budget has no room for it",
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
        "block_drop costs KL 0.1, and the budget has no room for it", "the only strategy allowed", "not profiled"
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
    made(budget(value=0.2), measuring={"batch_size": 2, "tick": tick, "expect": expected.append})
    assert {len(sequences) for _, sequences, *_ in asked} == {5, 3} and asked[-1][1] == VERIFICATION
    assert all((size, used, dense) == (2, tick, None) for _, _, size, used, dense in asked)
    assert expected == [len(sets) * (3 if sequences == CALIBRATION else 2) for sets, sequences, *_ in asked]
    assert not any(len(sets) != len(set(sets)) for sets, *_ in asked)
    made(budget(value=0.2))
    assert asked[-1][2] == 8 and asked[-1][3] is None


def test_the_baseline_sets_are_measured_once_and_compared(asked):
    plan, choice, compared = made(budget("drop", 2, [DROP]), compare=True)
    assert list(compared)[:3] == ["this plan", "the paper's back-to-front order", "the last"] and len(compared) == 9
    assert compared["this plan"] == comparison(COSTS[m(0)] + COSTS[a(2)]) and set(choice.drops) == {a(2), m(0)}
    assert compared["the last"].kl == pytest.approx(COSTS[a(2)] + COSTS[a(1)])
    whole = [frozenset(s) for sets, sequences, *_ in asked if sequences == CALIBRATION for s in sets]
    cumulative = [frozenset([a(0), a(1), a(2)]), frozenset([a(1), a(2)]), frozenset([a(2)])]
    assert all(s in whole for s in cumulative)
    assert plan.verified.kl == min(m.kl for m in compared.values())
    _, _, nothing = made(budget("drop", 0, [DROP]), compare=True)
    assert nothing == {}


def test_with_compare_a_baseline_that_measures_best_is_the_plan(monkeypatch):
    """The last two blocks cost nothing, whatever the profile says of them alone."""
    truth = {a(i): 0.1 for i in range(10)} | {a(10): 0.001, a(11): 0.001}

    def measured(subject, sequences, *, plans, batch_size, tick):
        return None, [comparison(sum(truth[p] for p in drops)) for drops in plans]

    monkeypatch.setattr(whole_plans, "measure", measured)
    p = make_profile([0.1 + 0.01 * i for i in range(12)])
    for compare, dropped in ((True, [10, 11]), (False, [0, 1])):
        plan, _, _ = made(budget("drop", 2, [DROP]), p, compare=compare, modules=[f"layers.{i}" for i in range(12)])
        assert plan.drops.blocks("attention") == dropped


def noting(state: list) -> SimpleNamespace:
    """A model that notes what it runs, and that it is dense again."""

    @contextmanager
    def running(drops):
        state.append(drops)
        yield
        state.append(NOTHING_DROPPED)

    return SimpleNamespace(running=running)


def test_an_accuracy_of_tasks_is_chosen_by_the_one_half_and_verified_by_the_other(monkeypatch):
    """Block 1's attention costs most on the tasks; the loss is asked for with the plan running, and only then."""
    state: list[Drops] = []
    lm = noting(state)
    halves = []

    def measured(subject, sequences, *, plans, batch_size, tick):
        assert subject.lm is lm
        return None, [comparison(sum(COSTS[p] for p in drops)) for drops in plans]

    monkeypatch.setattr(whole_plans, "measure", measured)

    def losing(name):
        def loss():
            halves.append(name)
            return {"t": 0.5 if a(1) in state[-1] else 0.01}, {"t": 0.001}

        return loss

    b = budget("max_accuracy_drop", 0.1, [DROP], tasks=["t"])
    losses = (losing("calibrate"), losing("verify"))
    plan, _, _ = made(b, make_profile([0.4, 0.1, 0.05]), lm=lm, losses=losses)
    assert a(1) not in plan.drops and plan.drops and state[-1] == NOTHING_DROPPED
    assert plan.verified.task_accuracy_drop == {"t": 0.01} and plan.verified.task_accuracy_drop_stderr == {"t": 0.001}
    assert halves[-1] == "verify" and "calibrate" in halves
    assert state[1::2] == [NOTHING_DROPPED] * (len(state) // 2)


def test_a_budget_of_tasks_sees_the_plan_it_is_about(monkeypatch):
    state: list[Drops] = []
    monkeypatch.setattr(whole_plans, "measure", lambda subject, sequences, **given: (None, [comparison(0.1)]))
    plan, always = Drops.of({a(1): DROP, m(0): DROP}), Drops.of({a(0): DROP})
    found = measure_plans(
        [plan], [[[1]]], subject=Subject(noting(state), always=always), task_loss=lambda: ({"t": 0.25}, {"t": 0.01})
    )[0]
    assert found.task_accuracy_drop == {"t": 0.25} and found.task_accuracy_drop_stderr == {"t": 0.01}
    assert state == [always | plan, NOTHING_DROPPED] and found.kl == comparison(0.1).kl


def test_a_budget_that_nothing_keeps_writes_no_plan(asked):
    with pytest.raises(SpdError, match=r"No sync point can be dropped within KL 0.001"):
        made(budget(value=0.001))


@pytest.mark.parametrize(("sequences", "part"), [(3, 3), (4, 4), (32, 4), (33, 5), (80, 10)])
def test_sets_race_on_an_eighth_of_the_text_or_four_sequences(sequences, part):
    text = [[n] for n in range(sequences)]
    assert whole_plans.part_of(text) == text[:part]


def test_measuring_plans_is_measuring_them_on_each_text():
    lm, ticks = TensorParallelLM.simulated(tiny.build("llama"), 2), []
    sequences = [tiny.tokens(1, 8, seed=n)[0].tolist() for n in range(3)]
    plans = [Drops.of({a(1): DROP}), Drops.of({a(0): PLAIN, m(2): DROP})]
    one = {"batch_size": 2, "tick": lambda i, tally: ticks.append(i)}
    found = measure_plans(plans, [sequences], subject=Subject(lm), **one)
    assert found == measure(Subject(lm), sequences, plans=plans, batch_size=2)[1] and ticks == [0, 1, 0, 1]
    other = TensorParallelLM.simulated(tiny.build("llama", seed=1), 2)
    compared = measure_plans(plans, [sequences], subject=Subject(lm, original=other), **one)
    assert compared[0].kl > found[0].kl
    both = measure_plans(plans, [sequences[:1], sequences[1:]], subject=Subject(lm), **one)
    assert [c.kl for c in both[0].per_text] == pytest.approx(
        [measure(Subject(lm), part, plans=plans[:1])[1][0].kl for part in (sequences[:1], sequences[1:])]
    )
