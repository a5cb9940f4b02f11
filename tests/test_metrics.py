"""Metrics against a loop, and by hand: numbers small enough for paper, written out."""

import math

import pytest
import torch
from naive_metrics import agrees, naive
from tiles import metrics_of_logits
from two_processes import in_processes

from spd_calib.errors import InputError
from spd_calib.parallel.comm import DistributedComm
from spd_calib.sensitivity.metrics import MAX_NLL, Tally, perplexity
from spd_calib.sensitivity.predictions import FIELDS, Predictions, token_metrics

LOG2, LOG4 = math.log(2), math.log(4)


@pytest.mark.parametrize("part", [1, 5, 19])
def test_token_metrics_equal_a_loop(part):
    torch.manual_seed(0)
    dense, planned = torch.randn(3, 7, 19) * 2, torch.randn(3, 7, 19) * 2
    targets = torch.randint(0, 19, (3, 7))
    tally = Tally()
    lengths = (7, 4, 2)
    for i, n in enumerate(lengths):
        rows, largest = metrics_of_logits(dense[i, :n], planned[i, :n], targets[i, :n], part=part)
        tally.sums.append(rows.sum(0))
        tally.tokens.append(n)
        tally.max_abs_logprob_diff = max(tally.max_abs_logprob_diff, largest)
    cut = [[x[i, :n] for i, n in enumerate(lengths)] for x in (dense, planned, targets)]
    agrees(tally.comparison(), naive(*cut))


def test_with_equal_lengths_the_error_is_that_of_the_sequences_means():
    values = torch.tensor([1.0, 3.0, 2.0, 7.0], dtype=torch.float64)
    tally = Tally(sums=[torch.full((6,), 5 * float(v), dtype=torch.float64) for v in values], tokens=[5] * 4)
    mean, error = tally._mean("kl")
    assert mean == pytest.approx(values.mean().item())
    assert error == pytest.approx(values.std().item() / 2)


def tally(rows, tokens, largest=0.0) -> Tally:
    return Tally([torch.tensor(row, dtype=torch.float64) for row in rows], list(tokens), largest)


def test_one_token_of_three_words():
    """p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4): KL = 1/2 log 2 - 1/4 log 2."""
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    for found, largest in (
        metrics_of_logits(p.log() + 3, q.log() - 1, torch.tensor([1]), part=2),  # any constant may be added
        metrics_of_logits(p.log(), q.log(), torch.tensor([1])),
    ):
        assert found.dtype == torch.float64 and found.shape == (1, len(FIELDS))
        assert found[0].tolist() == pytest.approx([LOG4, LOG2, LOG2 / 4, 0, 1, 0], abs=1e-6)
        assert largest == pytest.approx(LOG2, abs=1e-6)


def test_half_precision_is_raised_before_the_softmax():
    p, q = torch.tensor([[3.0, 1.0]]).half(), torch.tensor([[1.0, 3.0]]).half()
    found, _ = metrics_of_logits(p, q, torch.tensor([0]))
    exact = 2 * (math.exp(3) - math.exp(1)) / (math.exp(3) + math.exp(1))
    assert found[0, 2].item() == pytest.approx(exact, abs=1e-6)


def test_what_processes_know_of_their_parts_of_the_vocabulary_is_joined(tmp_path):
    """Parts of 4, 4 and 3 tokens; the largest logits of some are equal in two of them, and targets open one."""
    generator = torch.Generator().manual_seed(0)
    dense, planned = (3 * torch.randn(6, 11, generator=generator) for _ in range(2))
    dense[0, [3, 9]], planned[1, [5, 10]] = 20.0, 20.0
    targets = torch.tensor([4, 8, 9, 0, 7, 10])
    expected, most = metrics_of_logits(dense, planned, targets)

    def work(rank: int) -> None:
        comm, first = DistributedComm(), 4 * rank
        of_dense, own = (z[:, first : first + 4] for z in (dense, planned))
        p, q = Predictions.none_yet(targets), Predictions.none_yet(targets)
        p.add(of_dense.clone(), first, targets)
        p = p.joined(comm)
        q.compare(own, of_dense, (of_dense - p.largest.float()[:, None]).exp())
        q.add(own.clone(), first, targets)
        found, largest = token_metrics(p, q.joined(comm), targets)
        assert torch.allclose(found, expected, atol=1e-6) and largest == pytest.approx(most)
        assert (p.token[0], q.joined(comm).token[1]) == (3, 5)

    in_processes(3, tmp_path / "store", work)


def test_a_perplexity_is_any_number_there_is():
    assert perplexity(0.0) == 1 and perplexity(MAX_NLL) == math.exp(MAX_NLL) < math.inf
    with pytest.raises(InputError) as e:
        perplexity(MAX_NLL + 1)
    assert str(e.value) == (
        "The model's loss is 710 nats a token, and of more than 709 there is no perplexity: its weights or the "
        "tokenizer are not those it was trained with; name the right ones."
    )


@pytest.mark.parametrize("part", [1, 2, 5])
def test_of_equal_logits_the_first_token_is_the_prediction(part):
    """As argmax has it: what bfloat16 rounds to one number is common."""
    dense, planned = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0]]), torch.tensor([[2.0, 1.0, 2.0, 2.0, 1.0]])
    for target in range(5):
        found, _ = metrics_of_logits(dense, planned, torch.tensor([target]), part=part)
        assert found[0, 3:].tolist() == [target == 1, target == 0, False]
    assert metrics_of_logits(dense, dense, torch.tensor([2]), part=part)[0][0, 3:].tolist() == [0, 0, 1]


def test_a_plan_far_off_costs_what_it_costs():
    """Logits hundreds apart, where the probabilities of either underflow in float32."""
    torch.manual_seed(0)
    dense, planned = torch.randn(6, 40) * 200, torch.randn(6, 40) * 300 + 1000
    found, largest = metrics_of_logits(dense, planned, torch.arange(6))
    p, q = dense.double().log_softmax(-1), planned.double().log_softmax(-1)
    assert torch.allclose(found[:, 2], (p.exp() * (p - q)).sum(-1), rtol=1e-6)
    assert largest == pytest.approx((p - q).abs().max().item(), rel=1e-6)
    for at in ("dense", "planned"):
        with_nan = {"dense": dense.clone(), "planned": planned.clone()}
        with_nan[at][2, 7] = math.nan
        kl = metrics_of_logits(with_nan["dense"], with_nan["planned"], torch.arange(6))[0][:, 2]
        assert kl.isfinite().tolist() == [True, True, False, True, True, True]


@pytest.mark.parametrize(("shift", "sign"), [(0.7, 1), (-0.7, -1)])
def test_the_largest_difference_has_no_sign(shift, sign):
    p = torch.tensor([[0.0, 0.0, 0.0, 0.0]]).log_softmax(-1)
    q = p.clone()
    q[0, 2] += shift
    q[0, [0, 1, 3]] = math.log((1 - math.exp(q[0, 2])) / 3)
    assert metrics_of_logits(p, q, torch.tensor([0]))[1] == pytest.approx(0.7, abs=1e-6)


def test_means_are_over_tokens_and_errors_over_sequences():
    """Sequences of 1 and 3 tokens, KL sums 1 and 2: mean 3/4; residuals 1/4 and -1/4; error sqrt(2 * 2/16) / 4."""
    t = tally([[2.0, 3.0, 1.0, 1.0, 0.0, 1.0], [6.0, 5.0, 2.0, 2.0, 3.0, 3.0]], [1, 3], 0.5)
    c = t.comparison()
    assert (c.kl, c.kl_stderr) == pytest.approx((0.75, 0.125), abs=1e-15)
    assert t.kl() == 0.75
    assert (c.nll_increase, c.nll_increase_stderr) == pytest.approx((0.0, math.sqrt(2 * 2) / 4), abs=1e-15)
    assert c.ppl == pytest.approx(math.exp(2)) and c.ppl_increase == 0
    assert (c.accuracy_drop, c.accuracy_drop_stderr) == pytest.approx((0.0, math.sqrt(2 * 2) / 4), abs=1e-15)
    assert (c.top1_agreement, c.top1_agreement_stderr) == (1.0, 0.0)
    assert (c.max_abs_logprob_diff, c.tokens, c.sequences, c.routed_as_dense) == (0.5, 4, 2, None)
    b = t.baseline()
    assert (b.nll, b.top1_accuracy, b.tokens) == (2.0, 0.75, 4) and b.ppl == pytest.approx(math.exp(2))


def test_one_sequence_tells_no_error():
    c = tally([[2.0, 3.0, 1.0, 1.0, 0.0, 1.0]], [2]).comparison()
    assert c.kl == 0.5
    errors = (c.kl_stderr, c.nll_increase_stderr, c.accuracy_drop_stderr, c.top1_agreement_stderr)
    assert errors == (None, None, None, None)
    assert c.nll_increase == 0.5 and c.ppl_increase == pytest.approx(math.exp(0.5) - 1)


def test_the_mean_keeps_the_digits_of_float64():
    """Residuals are differences of large numbers: in float32 they would be lost."""
    t = tally([[1e9 + 0.25] * 6, [1e9 - 0.25] * 6], [3, 3])
    mean, error = t._mean("kl")
    assert mean == pytest.approx(1e9 / 3, abs=1e-6) and error == pytest.approx(math.sqrt(2 * 0.125) / 6, rel=1e-6)


def test_a_state_comes_back_to_the_bit():
    t = tally([[1 / 3, 2 / 3, 1e-17, 1, 0, 1 / 7]], [5], 0.1)
    back = Tally.of_state(t.state())
    assert torch.equal(back.sums[0], t.sums[0]) and (back.tokens, back.max_abs_logprob_diff) == ([5], 0.1)
    assert back.routed == [] and "routed" not in t.state()
    back.tokens.append(1)
    assert t.tokens == [5]
    t.routed = [2.5]
    assert Tally.of_state(t.state()).routed == [2.5]


def test_adding_keeps_the_order_and_the_largest():
    t = tally([[1.0] * 6], [1], 0.3)
    t.add(tally([[2.0] * 6], [2], 0.2))
    assert [row[0].item() for row in t.sums] == [1, 2] and t.tokens == [1, 2] and t.max_abs_logprob_diff == 0.3
    t.add(tally([], [], 0.4))
    assert t.max_abs_logprob_diff == 0.4
    for routed in ([0.5], [1.25]):
        t.add(Tally([], [], 0.0, routed))
    assert t.comparison().routed_as_dense == 1.75 / 3


def test_what_is_not_finite_is_said_and_refused():
    bad = tally([[1.0] * 6, [1, 1, math.nan, 1, 1, 1]], [1, 1])
    assert tally([[1.0] * 6], [1]).finite() and not bad.finite()
    with pytest.raises(InputError) as e:
        bad.kl()
    assert str(e.value) == "The kl of a measurement is not finite: the model's weights or logits hold NaN or Inf."
