"""Metrics and measurements against loops written out by hand."""

import math

import pytest
import reference
import tiny
import torch

from spd_calib.errors import InputError
from spd_calib.formats.common import Strategy
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.sensitivity import measure as measuring
from spd_calib.sensitivity.measure import Experiment, measure
from spd_calib.sensitivity.metrics import Tally, token_metrics
from spd_calib.sensitivity.profile import drops, profile

KEEP, DROP, PLAIN = Strategy.KEEP_SYNC, Strategy.BLOCK_DROP, Strategy.PLAIN_DROP


def naive(dense, planned, targets):
    """Every field of a comparison, token by token, in Python floats. Lists of [T, V] and [T], one a sequence."""
    rows = []
    for p_logits, q_logits, target in zip(dense, planned, targets, strict=True):
        tokens = []
        for p, q, t in zip(p_logits.double(), q_logits.double(), target.tolist(), strict=True):
            lp = [x.item() - math.log(sum(math.exp(y) for y in p.tolist())) for x in p]
            lq = [x.item() - math.log(sum(math.exp(y) for y in q.tolist())) for x in q]
            tokens.append(
                {
                    "kl": sum(math.exp(a) * (a - b) for a, b in zip(lp, lq, strict=True)),
                    "nll_increase": lp[t] - lq[t],
                    "accuracy_drop": (max(range(len(lp)), key=lp.__getitem__) == t)
                    - (max(range(len(lq)), key=lq.__getitem__) == t),
                    "top1_agreement": float(lp.index(max(lp)) == lq.index(max(lq))),
                    "largest": max(abs(a - b) for a, b in zip(lp, lq, strict=True)),
                    "nll": -lq[t],
                    "nll_dense": -lp[t],
                }
            )
        rows.append(tokens)
    everything = [t for tokens in rows for t in tokens]
    out = {k: sum(t[k] for t in everything) / len(everything) for k in everything[0]}
    out["largest"] = max(t["largest"] for t in everything)
    for k in ("kl", "nll_increase", "accuracy_drop", "top1_agreement"):  # jackknife-free: residuals of the ratio
        residuals = [sum(t[k] for t in tokens) - out[k] * len(tokens) for tokens in rows]
        m = len(rows)
        out[f"{k}_stderr"] = math.sqrt(m / (m - 1) * sum(r * r for r in residuals)) / len(everything)
    return out


def agrees(comparison, expected, tolerance=2e-5):
    for key, value in expected.items():
        if key in ("nll", "nll_dense", "largest"):
            continue
        assert getattr(comparison, key) == pytest.approx(value, abs=tolerance), key
    assert comparison.max_abs_logprob_diff == pytest.approx(expected["largest"], abs=1e-4)
    assert comparison.ppl == pytest.approx(math.exp(expected["nll"]), rel=1e-5)
    assert comparison.ppl_increase == pytest.approx(math.exp(expected["nll"] - expected["nll_dense"]) - 1, abs=1e-5)


def test_token_metrics_equal_a_loop():
    torch.manual_seed(0)
    dense, planned = torch.randn(3, 7, 19) * 2, torch.randn(3, 7, 19) * 2
    targets = torch.randint(0, 19, (3, 7))
    tally = Tally()
    lengths = (7, 4, 2)
    for i, n in enumerate(lengths):
        rows, largest = token_metrics(dense[i, :n], planned[i, :n], targets[i, :n])
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


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_measuring_equals_the_reference_run_whole(family, monkeypatch):
    """Prefix sharing, batching, padding and chunking change nothing."""
    monkeypatch.setattr(measuring, "LOGITS_AT_A_TIME", 131 * 5)  # several chunks a sequence
    dense = tiny.build(family)
    lm = TensorParallelLM.simulated(tiny.build(family), 4)
    sequences = [tiny.tokens(1, n, seed=n)[0].tolist() for n in (12, 9, 16, 7, 12)]
    experiments = [
        Experiment.dropping([2], DROP, 4),
        Experiment.dropping([0, 3], PLAIN, 4),
        Experiment((DROP, PLAIN, KEEP, DROP), (DROP, KEEP, DROP, KEEP)),
        Experiment.dropping([], DROP, 4),
    ]
    baseline, found = measure(lm, sequences, experiments, batch_size=2)
    targets = [torch.tensor(s[1:]) for s in sequences]

    def run(experiment):
        return [
            reference.logits(
                dense, torch.tensor([s]), 4, [*map(str, experiment.attention)], [*map(str, experiment.mlp)]
            )[0, :-1]
            for s in sequences
        ]

    p = run(experiments[-1])
    for experiment, comparison in zip(experiments, found, strict=True):
        agrees(comparison, naive(p, run(experiment), targets))
    assert found[-1].kl == 0 and found[-1].top1_agreement == 1
    expected = naive(p, p, targets)
    assert baseline.nll == pytest.approx(expected["nll_dense"], abs=1e-5)
    assert baseline.tokens == sum(len(s) - 1 for s in sequences)


def test_the_batch_size_changes_nothing():
    lm = TensorParallelLM.simulated(tiny.build("llama"), 2)
    sequences = [tiny.tokens(1, n, seed=n)[0].tolist() for n in (12, 9, 16, 7, 12)]
    experiments = [Experiment.dropping([1], DROP, 4)]
    one, five = (measure(lm, sequences, experiments, batch_size=n)[1][0] for n in (1, 5))
    for key, value in one.model_dump().items():
        assert getattr(five, key) == pytest.approx(value, rel=1e-5, abs=1e-5), key


def test_cumulative_goes_from_the_last_block_backwards():
    assert [(t.block, t.dropped) for t in drops("cumulative", [DROP], 3)] == [(2, [2]), (1, [1, 2]), (0, [0, 1, 2])]
    assert [(t.block, t.dropped) for t in drops("single", [DROP], 3)] == [(0, [0]), (1, [1]), (2, [2])]


def test_the_mlp_sync_point_is_deferred_in_every_block_but_the_last():
    both = list(drops("single", [DROP, PLAIN], 3, ["attention", "mlp"]))
    assert [(t.block, t.strategy) for t in both if t.sync_point == "mlp"] == [(0, DROP), (1, DROP)]
    assert len(both) == 8 and {t.sync_point for t in drops("single", [DROP], 3, ["mlp"])} == {"mlp"}


def test_an_mlp_measurement_is_of_the_mlp():
    lm = TensorParallelLM.simulated(tiny.build("llama"), 2)
    sequences = tiny.tokens(4, 16).tolist()
    _, rows, _ = profile(lm, sequences, "single", [DROP], 4, lambda i, tally: None, sync_points=["attention", "mlp"])
    assert [(r.block, r.sync_point) for r in rows[4:]] == [(0, "mlp"), (1, "mlp"), (2, "mlp")]
    deferred = Experiment((KEEP,) * 4, (KEEP, DROP, KEEP, KEEP))
    assert rows[5].kl == measure(lm, sequences, [deferred])[1][0].kl


def test_cumulative_measures_the_whole_set():
    lm = TensorParallelLM.simulated(tiny.build("llama"), 2)
    sequences = tiny.tokens(4, 16).tolist()
    _, rows, _ = profile(lm, sequences, "cumulative", [DROP], 4, lambda i, tally: None)
    together = measure(lm, sequences, [Experiment.dropping([1, 2, 3], DROP, 4)])[1][0]
    (row,) = [r for r in rows if r.block == 1]
    assert row.dropped == [1, 2, 3]
    assert row.kl == together.kl and row.nll_increase == together.nll_increase


def test_weights_that_are_not_finite_are_named():
    lm = TensorParallelLM.simulated(tiny.build("llama"), 2)
    lm.blocks[1].down_bias = torch.full((64,), float("nan"))
    with pytest.raises(InputError, match="NaN or Inf"):
        measure(lm, tiny.tokens(2, 8).tolist(), [Experiment.dropping([0], DROP, 4)])
