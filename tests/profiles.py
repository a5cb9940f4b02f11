"""Profiles for the tests, written by hand, and worlds in which sets of sync points cost what the test says."""

import itertools

import numpy as np

from spd_calib.formats.common import ModelRef, Provenance, TensorParallel, TextRef
from spd_calib.formats.drops import Point, Strategy
from spd_calib.formats.plan import Budget
from spd_calib.formats.profile import Baseline, Comparison, Fisher, Measurement, Profile, Recovered
from spd_calib.planning.search import Choice, choose
from spd_calib.planning.whole_plans import Calibration

DROP, PLAIN = Strategy.BLOCK_DROP, Strategy.PLAIN_DROP


def comparison(kl: float, accuracy_drop: float | None = None, ppl: float | None = None) -> Comparison:
    return Comparison(
        kl=kl,
        kl_stderr=0.001,
        nll_increase=kl,
        nll_increase_stderr=0.001,
        ppl=ppl or 10 * (1 + kl),
        ppl_increase=kl if ppl is None else ppl / 10 - 1,
        accuracy_drop=kl / 4 if accuracy_drop is None else accuracy_drop,
        accuracy_drop_stderr=0.001,
        top1_agreement=0.9,
        top1_agreement_stderr=0.01,
        max_abs_logprob_diff=1,
        tokens=100,
        sequences=64,
    )


def a(block: int) -> Point:
    return Point(block=block, sync_point="attention")


def m(block: int) -> Point:
    return Point(block=block, sync_point="mlp")


def make_profile(block_drop, plain_drop=None, method="single", rank_by="kl", mlp=(), **changes) -> Profile:
    """A profile whose KL per block and strategy is as given, and per MLP where there are any."""
    n = len(block_drop)
    rows = []
    for strategy, values in ((DROP, block_drop), (PLAIN, plain_drop or [])):
        for block, kl in enumerate(values):
            dropped = [block] if method == "single" else list(range(block, n))
            rows.append(Measurement(**vars(comparison(kl)), block=block, strategy=strategy, dropped=dropped))
    for block, kl in enumerate(mlp):
        rows.append(Measurement(**vars(comparison(kl)), block=block, sync_point="mlp", strategy=DROP, dropped=[block]))
    text = TextRef(source="t", seq_len=8, min_len=8, pack=False, first=0, sequences=64, tokens=512, sha256="0" * 64)
    return Profile(
        model=ModelRef(id="m", architecture="A", num_blocks=n, config_hash="0" * 64, weight_fingerprint="1" * 64),
        tensor_parallel=TensorParallel(size=2),
        method=method,
        rank_by=rank_by,
        text=text,
        verify_text=text,
        baseline=Baseline(nll=2.3, ppl=10, top1_accuracy=0.5, tokens=100),
        measurements=rows,
        provenance=Provenance(command="c", seed=0, device="cpu", dtype="float32", versions={}),
        **changes,
    )


def budget(kind="max_kl", value=0.1, strategies=(DROP, PLAIN), **more) -> Budget:
    return Budget(kind=kind, value=value, strategies=list(strategies), **more)


def total(costs, factor=1.0):
    """A model of the world in which sets cost `factor` times their sum."""
    return lambda sets: [comparison(factor * sum(costs[p.block] for p in drops)) for drops in sets]


def chosen(profile, budget, calibrate, verify, baselines=None) -> Choice:
    """choose(), where `calibrate` and `verify` say what each of several sets costs on either text."""

    def verified(drops, used_up: int) -> Comparison:
        return verify([drops])[0]

    return choose(profile, budget, calibration=Calibration(calibrate), verify=verified, baselines=baselines)


def by_point(costs):
    """Sets cost the sum of their sync points', MLPs by their own."""
    return lambda sets: [comparison(sum(costs[p] for p in drops)) for drops in sets]


def recovered(settled, alone) -> Recovered:
    return Recovered(recovered_from=make_profile([1]).model, plan_sha256="2" * 64, settled=settled, alone=alone)


def random_fisher(n_blocks: int, seed: int) -> Fisher:
    """The Gram matrix of random scores, with the terms of both kinds of sync points."""
    rng = np.random.default_rng(seed)
    points = [p for i in range(n_blocks) for p in (a(i), m(i))][:-1]
    terms = [[p] for p in points] + [list(pair) for pair in itertools.pairwise(points)]
    d = rng.normal(size=(40, len(terms))) * rng.uniform(0.1, 1, size=len(terms)) + rng.normal(size=(40, 1)) * 0.3
    gram = d.T @ d / 80
    rows = [[float(x) for x in row[i:]] for i, row in enumerate(gram)]
    return Fisher(terms=terms, matrix=rows, stderr=[[0.0] * len(r) for r in rows], samples=1, sampling_error=0.1)


def predicted(fisher: Fisher, chosen) -> float:
    """The sum of the matrix over the ordered pairs of terms that count, written out."""
    counts = [i for i, term in enumerate(fisher.terms) if all(p in chosen for p in term)]
    return sum(fisher.matrix[min(i, j)][abs(i - j)] for i in counts for j in counts)


def fisher_profile(fisher: Fisher) -> Profile:
    p = make_profile([0.1] * (max(t[0].block for t in fisher.terms) + 1))
    return Profile.model_validate({**p.model_dump(), "method": "fisher", "measurements": [], "fisher": fisher})
