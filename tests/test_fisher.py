"""Fisher's predictions against logits differentiated token by token, and against what the loop measures."""

import itertools
from functools import partial
from pathlib import Path

import pandas
import pytest
import tiny
import torch

from spd_calib.formats.drops import NOTHING_DROPPED, Drops, Point, Strategy
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.parallel.session import open_session
from spd_calib.parallel.streams import Streams
from spd_calib.planning.interactions import Interactions
from spd_calib.sensitivity.fisher import fisher_terms, interactions, predict, sampling_error
from spd_calib.sensitivity.measure import Subject, batches, measure
from spd_calib.sensitivity.scores import score
from spd_calib.sensitivity.text import TextOptions, load_text

BOTH = ["attention", "mlp"]
SEQUENCES = [tiny.tokens(1, n, seed=n)[0].tolist() for n in (12, 9, 16, 12)]


def dropping(points) -> Drops:
    """These sync points dropped by block_drop."""
    return Drops.of(dict.fromkeys(points, Strategy.BLOCK_DROP))


def change_of(lm, recording, points, block) -> tuple[torch.Tensor, torch.Tensor]:
    """The stream behind `block` as the dense model has it, and with `points` dropped."""
    first, found = min(p.block for p in points), []
    for drops in (NOTHING_DROPPED, dropping(points)):
        s = recording.streams[first]
        for i in range(first, block + 1):
            s = lm.blocks[i].run(s, drops, **recording.kwargs[i])
        found.append(s.shared)
    return found[0], found[1]


def logits_from(lm, recording, block, stream):
    s = Streams(stream)
    for i in range(block + 1, lm.num_blocks):
        s = lm.blocks[i].run(s, NOTHING_DROPPED, **recording.kwargs[i])
    return lm.head(lm.final_norm(s))


def exact(lm, sequences, changes) -> torch.Tensor:
    """1/2 dz_i' F dz_j per token, dz by forward-mode differentiation; `changes`: (points, last block run) a term."""
    total, tokens = 0.0, 0
    for ids, lengths in batches(sequences, 1, lm.device):
        with torch.no_grad():
            recording = lm.record(ids)
            p = lm.logits(recording.final)[0, :-1].softmax(-1).double()
            dz = []
            for points, block in changes:
                dense, dropped = change_of(lm, recording, points, block)
                epsilon = 1e-3
                ends = [logits_from(lm, recording, block, dense + e * (dropped - dense)) for e in (epsilon, -epsilon)]
                dz.append(((ends[0] - ends[1]) / (2 * epsilon))[0, :-1].double())
        z = torch.stack(dz)
        mean = torch.einsum("tv,itv->it", p, z)
        total = total + torch.einsum("tv,itv,jtv->ij", p, z, z) - torch.einsum("it,jt->ij", mean, mean)
        tokens += lengths[0] - 1
    return total / (2 * tokens)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_attention_matrix_is_the_fisher_form_of_the_logits_changes(family):
    lm = TensorParallelLM.simulated(tiny.build(family), 4)
    points = [Point(block=i, sync_point="attention") for i in range(4)]
    d = scores(lm, ["attention"], 80)
    found = interactions(torch.stack([d[(p,)] for p in points], -1), torch.tensor([len(s) - 1.0 for s in SEQUENCES]))[0]
    expected = exact(lm, SEQUENCES, [([p], p.block) for p in points])
    size = expected.diag().sqrt()
    assert ((found - expected).abs() <= 0.2 * size * size[:, None]).all(), (found, expected)


def scores(lm, kinds, samples):
    """d of every term [samples, sequences], F the dense model's alone."""
    ids, lengths = next(batches(SEQUENCES, 4, lm.device))
    generator = torch.Generator().manual_seed(0)
    found = score(lm, lm.record(ids), lengths=lengths, sync_points=kinds, samples=samples, generator=generator)
    return {term: d.double() for term, d in found.items()}


def quiet(family: str):
    """A model whose sub-layers add little: what second order leaves out is small."""
    model = tiny.build(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight")):
                parameter.mul_(0.1)
            if name.endswith(("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")):
                parameter.add_(1).mul_(0.1).sub_(1) if family == "gemma3" else None  # of a norm that adds one to it
    return TensorParallelLM.simulated(model, 4)


@pytest.mark.parametrize("family", ["llama", "opt", "gemma3"])
def test_sets_of_both_kinds_cost_what_is_predicted(family):
    """Single sync points, consecutive pairs (either way round), others, and three in a row."""
    lm = quiet(family)
    _, found = predict(lm, SEQUENCES, sync_points=BOTH, target_stderr=0.06, batch_size=4)
    model = Interactions.of_fisher(found)
    sets = [s for k in (1, 2) for s in itertools.combinations(range(7), k)] + [(0, 1, 2), (1, 2, 3), (0, 3, 6)]
    measured = measure(Subject(lm), SEQUENCES, plans=[dropping(model.points[i] for i in s) for s in sets])[1]
    for s, m in zip(sets, measured, strict=True):
        assert model.kl(dropping(model.points[i] for i in s)) == pytest.approx(m.kl, rel=0.35), s


def test_the_mlp_alone_can_be_asked_for():
    terms = fisher_terms(3, ["mlp"])
    assert [(t[0].block, t[0].sync_point, len(t)) for t in terms] == [(0, "mlp", 1), (1, "mlp", 1)]
    lm = quiet("llama")
    _, alone = predict(lm, SEQUENCES, sync_points=["mlp"], target_stderr=0.3)
    assert [t[0].sync_point for t in alone.terms] == ["mlp"] * 3
    together, attention = scores(lm, BOTH, 2), scores(lm, ["attention"], 2)
    assert all(torch.equal(d, together[term]) for term, d in attention.items())


def test_samples_are_drawn_until_the_error_asked_for():
    lm = quiet("llama")
    for target in (0.5, 0.15):
        ticks: list[None] = []
        _, found = predict(
            lm, SEQUENCES, sync_points=["attention"], target_stderr=target, batch_size=2,
            tick=partial(ticks.append, None),
        )  # fmt: skip
        assert found.sampling_error <= target and found.samples >= 2 / (4 * target**2)
        assert len(ticks) % 2 == 0


def test_the_seed_decides_and_the_strategies_are_left_kept():
    lm = quiet("llama")
    one, two, three = (
        predict(lm, SEQUENCES, sync_points=["attention"], target_stderr=0.5, seed=seed) for seed in (0, 0, 1)
    )
    assert one == two and one[1].matrix != three[1].matrix
    baseline, (kept,) = measure(Subject(lm), SEQUENCES, plans=[NOTHING_DROPPED])
    assert kept.kl == 0 and one[0] == baseline
    assert all(not p.grad_fn and p.grad is None for p in lm.model.parameters())


def test_the_matrix_is_the_mean_of_products_and_its_error_is_over_sequences():
    d = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens = torch.tensor([4.0, 6.0, 4.0, 5.0, 4.0], dtype=torch.float64)
    matrix, stderr = interactions(d, tokens)
    sums = [sum(0.5 * d[s, n, 0] * d[s, n, 1] for s in range(3)) / 3 for n in range(5)]
    mean = sum(sums) / 23
    assert matrix[0, 1].item() == pytest.approx(float(mean))
    squares = sum((q - mean * t) ** 2 for q, t in zip(sums, tokens, strict=True))
    assert stderr[0, 1].item() == pytest.approx(float(squares * 5 / 4) ** 0.5 / 23)


def test_of_gaussian_scores_the_error_is_the_one_known():
    d = torch.randn(40, 500, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert sampling_error(d) == pytest.approx((2 / 20000) ** 0.5, rel=0.05)


STORIES = Path(__file__).parents[2] / "shared"


@pytest.mark.skipif(not STORIES.is_dir(), reason="the real weights in ../shared are not here")
@pytest.mark.parametrize("tp", [2, 4])
def test_on_a_real_model_sets_are_ranked_as_they_measure(tp):
    """stories260k: every set of attention sync points, single points of both kinds, and pairs of any kind."""
    session = open_session(str(STORIES / "models/stories260k"), tp)
    options = TextOptions(str(STORIES / "data/tinystories-calibration.jsonl"), 128, 128, 64, 8)
    sequences, lm = load_text(options, session.tokenizer).calibration, session.load()
    _, found = predict(lm, sequences, sync_points=BOTH, target_stderr=0.08)
    model = Interactions.of_fisher(found)
    attention = [i for i, p in enumerate(model.points) if p.sync_point == "attention"]
    subsets = [s for k in range(1, 6) for s in itertools.combinations(attention, k)]
    singles, pairs = [(i,) for i in range(9)], list(itertools.combinations(range(9), 2))
    sets = subsets + singles + pairs
    plans = [dropping(model.points[i] for i in s) for s in sets]
    measured = measure(Subject(lm), sequences, plans=plans, batch_size=16)[1]
    rows = pandas.DataFrame(
        {"predicted": [model.kl(drops) for drops in plans], "measured": [m.kl for m in measured]}, index=sets
    )
    for some in (subsets, singles):
        assert rows.loc[some].corr("spearman").iloc[0, 1] >= 0.9
    for row in rows.loc[pairs].itertuples():
        assert row.measured >= 0.1 or row.predicted == pytest.approx(row.measured, rel=0.35), row
