"""Every figure of a comparison by loops over tokens, which measurements are held against."""

import math

import pytest


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
