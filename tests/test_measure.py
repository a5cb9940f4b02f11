"""Measuring plans, run whole against the dense model: the same as the reference run by hand, however it is batched."""

import pytest
import reference
import tiny
import torch
from naive_metrics import agrees, naive
from predictors import predictor

from spd_calib.errors import InputError
from spd_calib.formats.drops import NOTHING_DROPPED, Drop, Drops, Point, Strategy
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.sensitivity import reference as comparing
from spd_calib.sensitivity.measure import Subject, measure
from spd_calib.sensitivity.reference import Reference

KEEP, DROP, PLAIN = Strategy.KEEP_SYNC, Strategy.BLOCK_DROP, Strategy.PLAIN_DROP
SEQUENCES = [tiny.tokens(1, n, seed=n)[0].tolist() for n in (12, 9, 16, 7, 12)]


def attentions(blocks, strategy) -> Drops:
    """The attention of these blocks dropped, nothing else."""
    return Drops.of({Point(b, "attention"): strategy for b in blocks})


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_measuring_equals_the_reference_run_whole(family, monkeypatch):
    """Prefix sharing, batching, padding and chunking change nothing."""
    monkeypatch.setattr(comparing, "CPU_TILE", (5, 20))  # several a sequence; 131 tokens, 33 or fewer a rank
    monkeypatch.setattr(comparing, "HELD_BYTES", 2 * 20 * 64 * 4)  # two plans at a time, or three
    dense = tiny.build(family)
    lm = TensorParallelLM.simulated(tiny.build(family), 4)
    plans = [
        attentions([2], DROP),
        attentions([0, 3], PLAIN),
        Drops.of_blocks((DROP, PLAIN, KEEP, DROP), (DROP, KEEP, DROP, KEEP)),
        NOTHING_DROPPED,
    ]
    baseline, found = measure(Subject(lm), SEQUENCES, plans=plans, batch_size=2)
    targets = [torch.tensor(s[1:]) for s in SEQUENCES]

    def run(drops):
        attention, mlp = ([str(drops.strategy(Point(b, s))) for b in range(4)] for s in ("attention", "mlp"))
        return [reference.logits(dense, torch.tensor([s]), 4, attention, mlp)[0, :-1] for s in SEQUENCES]

    p = run(plans[-1])
    for drops, comparison in zip(plans, found, strict=True):
        agrees(comparison, naive(p, run(drops), targets))
    assert found[-1].kl == 0 and found[-1].top1_agreement == 1
    expected = naive(p, p, targets)
    assert baseline.nll == pytest.approx(expected["nll_dense"], abs=1e-5)
    assert baseline.tokens == sum(len(s) - 1 for s in SEQUENCES)


def test_the_batch_size_changes_nothing():
    lm = TensorParallelLM.simulated(tiny.build("llama"), 2)
    plans = [attentions([1], DROP)]
    one, five = (measure(Subject(lm), SEQUENCES, plans=plans, batch_size=n)[1][0] for n in (1, 5))
    for key, value in one.model_dump().items():
        assert getattr(five, key) == pytest.approx(value, rel=1e-5, abs=1e-5), key


def test_weights_that_are_not_finite_are_named():
    lm = TensorParallelLM.simulated(tiny.build("llama"), 2)
    lm.blocks[1].down_bias = torch.full((64,), float("nan"))
    with pytest.raises(InputError, match="NaN or Inf"):
        measure(Subject(lm), tiny.tokens(2, 8).tolist(), plans=[attentions([0], DROP)])


def test_a_plan_under_which_numbers_overflow_is_named():
    """Predictors that make what the MLP reads too large: nothing is wrong with the model itself."""
    lm = TensorParallelLM.simulated(tiny.build("opt"), 2)
    block = lm.blocks[2]
    huge = predictor("mean", block.d_rank, block.width, 0)
    huge.bias.data.fill_(float("inf"))
    plan = Drops({Point(2, "attention"): Drop(DROP, {0: huge, 1: huge})})
    with pytest.raises(InputError, match=r"in block 2 .*, MLP of rank 0: its numbers become too large for float32"):
        measure(Subject(lm), SEQUENCES, plans=[attentions([0], DROP), plan])
    assert lm(tiny.tokens(1, 4)).isfinite().all(), "the model is dense again"


@pytest.mark.parametrize("streamed", [False, True])
def test_what_is_dropped_always_is_dropped_in_every_plan(streamed):
    """Compared with the model itself with nothing dropped, where it was not made from another."""
    lm = TensorParallelLM.simulated(tiny.build("llama"), 2)
    lm.streamed = streamed  # its weights are in memory all the same; its plans go through the blocks in lockstep
    always = Drops.of({Point(1, "attention"): PLAIN, Point(1, "mlp"): DROP})
    some = [NOTHING_DROPPED, attentions([3], DROP), attentions([0, 1], DROP)]
    baseline, found = measure(Subject(lm, always), SEQUENCES, plans=some, batch_size=2)
    assert (baseline, found) == measure(Subject(lm), SEQUENCES, plans=[always | drops for drops in some], batch_size=2)
    assert found[0].kl > 0


@pytest.mark.parametrize("streamed", [False, True])
def test_a_model_made_from_another_is_compared_with_that_one(streamed):
    lm, original = (TensorParallelLM.simulated(tiny.build("llama", seed=seed), 2) for seed in (0, 1))
    lm.streamed = streamed
    always = Drops.of({Point(1, "attention"): DROP})
    plans = [attentions([3], PLAIN), NOTHING_DROPPED]
    baseline, (found, alone) = measure(Subject(lm, always, original), SEQUENCES, plans=plans, batch_size=2)

    def logits(model, drops):
        with model.running(drops):
            return [lm.logits(model.record(torch.tensor([s])).final)[0, :-1] for s in SEQUENCES]

    p, targets = logits(original, NOTHING_DROPPED), [torch.tensor(s[1:]) for s in SEQUENCES]
    agrees(found, naive(p, logits(lm, always | plans[0]), targets))
    expected = naive(p, logits(lm, always), targets)
    agrees(alone, expected)
    assert baseline.nll == pytest.approx(expected["nll_dense"], abs=1e-5)


def test_the_model_is_left_dense_and_what_it_ran_before_does_not_count():
    lm, ids = TensorParallelLM.simulated(tiny.build("llama"), 2), tiny.tokens(1, 6)
    plans = [attentions([1], DROP)]
    dense, expected = lm(ids), measure(Subject(lm), SEQUENCES, plans=plans)
    assert torch.equal(lm(ids), dense)
    with lm.running(attentions([0], PLAIN)):
        assert measure(Subject(lm), SEQUENCES, plans=plans) == expected


def test_streams_that_differ_are_compared_rank_by_rank():
    lm = TensorParallelLM.simulated(tiny.build("llama"), 4)
    ids, lengths, drops = tiny.tokens(2, 8), [8, 8], attentions([1, 2], PLAIN)
    recording = lm.record(ids)
    reference = Reference(lm, recording.final, input_ids=ids, lengths=lengths)
    same, tally = reference.compare([reference.hidden, reference.streams(lm.resume(recording, drops))])
    with lm.running(drops):
        expected = naive(lm.logits(recording.final)[:, :-1], lm(ids)[:, :-1], ids[:, 1:])
    agrees(tally.comparison(), expected)
    assert same.state() == reference.tally().state() and same.kl() == 0


def test_blocks_that_all_plans_run_alike_are_run_once():
    """Also where predictors had to be brought to the model's dtype: those of the recording are the plans' own."""
    lm = TensorParallelLM.simulated(tiny.build("llama").to(torch.bfloat16), 2)
    block = lm.blocks[1]
    predictors = {r: predictor("mean", block.d_rank, block.width, r) for r in (0, 1)}
    always = Drops({Point(1, "attention"): Drop(DROP, predictors)})
    runs = [0] * 4
    for i, b in enumerate(lm.blocks):
        b.mlps[0].register_forward_hook(lambda m, args, out, i=i: runs.__setitem__(i, runs[i] + 1))
    plans = [attentions([2], DROP), attentions([3], DROP), NOTHING_DROPPED]
    measure(Subject(lm, always), SEQUENCES, plans=plans, batch_size=len(SEQUENCES))
    assert runs == [2, 2, 3, 4]  # the dense model, the recording, and what each plan changes
