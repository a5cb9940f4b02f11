"""What a plan costs as it is served: the second half of each text, behind a prompt that another choice has read."""

import copy

import pytest
import reference
import tiny
import torch

from spd_calib.errors import InputError
from spd_calib.formats.drops import NOTHING_DROPPED, Drop, Drops, Point, Strategy
from spd_calib.formats.phases import ByPhase
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.sensitivity.measure import Subject, measure
from spd_calib.sensitivity.served import measure_served, served_batches

KEEP, DROP, PLAIN = Strategy
ALL = Drops.of_blocks([DROP] * 4, [DROP, KEEP, DROP, KEEP])
SOME = Drops({Point(1, "attention"): Drop(DROP), Point(3, "attention"): Drop(PLAIN)})
BITS = Drops.of_bits({Point(0, "mlp"): 4, Point(2, "attention"): 8})
TP = 4


def subject_of(family: str) -> Subject:
    return Subject(TensorParallelLM.simulated(tiny.build(family), TP))


def kl_by_hand(lm: TensorParallelLM, sequences, phases: ByPhase) -> float:
    """One sequence and one token at a time, by transformers' cache, over the logits of the whole vocabulary."""
    total = tokens = 0
    for ids in (torch.tensor([ids]) for ids in sequences):
        half = ids.shape[1] // 2
        dense = lm(ids)[0, half - 1 : -1].double().log_softmax(-1)
        with torch.no_grad():
            with lm.running(phases.prefill):
                out = lm.model(input_ids=ids[:, :half], use_cache=True)
            found = [out.logits[0, -1]]
            with lm.running(phases.decode):
                for t in range(half, ids.shape[1] - 1):
                    out = lm.model(input_ids=ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
                    found.append(out.logits[0, -1])
        served = torch.stack(found).double().log_softmax(-1)
        total += (dense.exp() * (dense - served)).sum().item()
        tokens += len(served)
    return total / tokens


@pytest.mark.parametrize("family", ["llama", "mistral_window", "qwen3_5", "olmoe"])
def test_it_is_the_kl_of_a_loop_over_tokens(family):
    sequences = [*tiny.tokens(3, 12).tolist(), *tiny.tokens(2, 9, seed=1).tolist()]
    subject = subject_of(family)
    plans = [ByPhase(ALL, NOTHING_DROPPED), ByPhase(NOTHING_DROPPED, ALL), ByPhase(ALL, BITS), ByPhase.of(ALL)]
    if family == "llama":
        plans += [ByPhase(SOME, ALL), ByPhase(ALL, SOME)]  # ranks whose streams differ in one phase alone
    found = [tally.comparison() for tally in measure_served(subject, sequences, plans=plans, batch_size=2)]
    for plan, measured in zip(plans, found, strict=True):
        assert measured.kl == pytest.approx(kl_by_hand(subject.lm, sequences, plan), rel=1e-3, abs=1e-7)
        assert (measured.tokens, measured.sequences) == (3 * 6 + 2 * 5, 5)
    assert found[0].kl != pytest.approx(found[3].kl, rel=0.05) and 0 < found[0].kl < found[3].kl


def test_it_is_the_kl_of_the_reference_without_any_cache():
    """The reference treats the tokens of the prompt otherwise than those behind it, all in one forward in float64."""
    model, ids = tiny.build("llama"), tiny.tokens(2, 12)
    attention, prefill = [DROP] * 4, dict.fromkeys(((0, "attention"), (1, "mlp")), ("block_drop", None))
    logits = [reference.logits(copy.deepcopy(model), ids, TP, ["keep_sync"] * 4)]
    logits += [reference.logits(copy.deepcopy(model), ids, TP, [*map(str, attention)], prefill=prefill, prompt=6)]
    dense, served = (of_model[:, 5:-1].log_softmax(-1) for of_model in logits)
    plan = ByPhase(Drops.of({Point(0, "attention"): DROP, Point(1, "mlp"): DROP}), Drops.of_blocks(attention))
    found = measure_served(subject_of("llama"), ids.tolist(), plans=[plan])[0].comparison()
    assert found.kl == pytest.approx((dense.exp() * (dense - served)).sum(-1).mean().item(), rel=1e-4)
    assert found.max_abs_logprob_diff == pytest.approx((dense - served).abs().max().item(), rel=1e-3)


def test_one_choice_is_what_measuring_it_whole_says_of_second_halves():
    """Behind a prompt of half its tokens a sequence of one choice is that sequence."""
    sequences, subject = tiny.tokens(4, 10).tolist(), subject_of("llama")
    (served,) = measure_served(subject, sequences, plans=[ByPhase.of(ALL)])
    _, (whole,) = measure(subject, sequences, plans=[ALL])
    _, (first,) = measure(subject, [ids[:5] for ids in sequences], plans=[ALL])
    assert 9 * whole.kl - 4 * first.kl == pytest.approx(5 * served.kl(), rel=1e-4)


def test_what_is_always_dropped_is_dropped_in_both_phases():
    subject, sequences = subject_of("llama"), tiny.tokens(2, 8).tolist()
    always = Subject(subject.lm, always=SOME)
    (found,) = measure_served(always, sequences, plans=[ByPhase.of(NOTHING_DROPPED)])
    (expected,) = measure_served(subject, sequences, plans=[ByPhase.of(SOME)])
    assert found.kl() == pytest.approx(expected.kl(), rel=1e-6) and found.kl() > 0


def test_every_batch_of_every_plan_is_told_and_has_one_length():
    sequences = [[1] * n for n in (8, 6, 8, 8, 6)]
    assert [[len(ids) for ids in batch] for batch in served_batches(sequences, 2)] == [[8, 8], [8], [6, 6]]
    told = []
    plans = [ByPhase.of(ALL), ByPhase.of(SOME)]
    measure_served(subject_of("llama"), sequences, plans=plans, batch_size=2, tick=lambda i, tally: told.append(i))
    assert sorted(told) == [0] * 3 + [1] * 3


def test_a_sequence_that_holds_no_prompt_is_refused():
    with pytest.raises(InputError, match="min_len of 4 tokens"):
        measure_served(subject_of("llama"), [[1, 2, 3]], plans=[ByPhase.of(ALL)])


def test_a_plan_that_overflows_names_the_block():
    subject = subject_of("llama")
    with torch.no_grad():
        subject.lm.blocks[2].parts.dense.down.weight.fill_(torch.nan)
    with pytest.raises(InputError, match=r"layers\.2"):
        measure_served(subject, tiny.tokens(2, 8).tolist(), plans=[ByPhase.of(ALL)])
