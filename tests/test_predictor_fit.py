"""Predictors of what a rank misses: the block that reads them, the ridge regressions, and the choice among forms."""

import pytest
import tiny
import torch
from planned_models import planned, sequences

from spd_calib.errors import InputError
from spd_calib.formats.drops import Drop, Drops, Point, Strategy
from spd_calib.models.predictor import Predictor
from spd_calib.models.probe import find_layers
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.parallel.streams import Streams
from spd_calib.recovery import predictor_fit
from spd_calib.recovery.feed import Feed
from spd_calib.recovery.moments import HeadMoments
from spd_calib.recovery.predictor_fit import PredictorForm, forms_up_to

DROP = Strategy.BLOCK_DROP


def test_a_block_with_compensation_is_the_naive_one() -> None:
    model = tiny.build("opt", layers=1)
    parts, ids = find_layers(model)[0], tiny.tokens(2, 10)
    lm = TensorParallelLM.simulated(model, 4)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(*shape, generator=generator)

    forms = {
        "mean": [Predictor(draw(64)) for _ in range(4)],
        "low_rank": [Predictor(draw(64), a=draw(16, 3), b=draw(3, 64)) for _ in range(4)],
        "full": [Predictor(draw(64), w=draw(16, 64)) for _ in range(4)],
    }
    recording = lm.record(ids)
    x, kwargs = recording.streams[0].shared, recording.kwargs[0]
    for kind, predictors in forms.items():
        drops = Drops({Point(0, "attention"): Drop(DROP, dict(enumerate(predictors)))})
        with torch.no_grad():
            got = lm.blocks[0].run(Streams(x), lm.fitted(drops), **kwargs).shared
            z = []
            hook = parts.o.register_forward_pre_hook(lambda m, args, z=z: z.append(args[0]))
            a = parts.attention(hidden_states=parts.norm1(x), **kwargs)[0] - parts.o.bias
            hook.remove()
            y = x + a + parts.o.bias + parts.down.bias
            for rank, c in enumerate(predictors):
                own = slice(rank * 16, (rank + 1) * 16)
                z_own, partial = z[0][..., own], z[0][..., own] @ parts.o.weight[:, own].T
                predicted = {
                    "mean": lambda: partial + c.bias,  # noqa: B023
                    "low_rank": lambda: partial + c.bias + z_own @ c.a @ c.b,  # noqa: B023
                    "full": lambda: z_own @ c.w + c.bias,  # noqa: B023
                }[kind]()
                neurons = slice(rank * 32, (rank + 1) * 32)
                act = parts.activation(parts.mlp_in[0](parts.norm2(x + predicted + parts.o.bias)))[..., neurons]
                y = y + act @ parts.down.weight[:, neurons].T
        assert c.kind == kind and (got - y).abs().max() < 1e-5
    with torch.no_grad():
        assert torch.equal(lm(ids), lm.logits(recording.final))
    with pytest.raises(InputError, match="does not fit"):
        lm.fitted(Drops({Point(0, "attention"): Drop(DROP, {rank: Predictor(draw(32)) for rank in range(4)})}))
    with pytest.raises(InputError, match="no predictor for rank 3 of 4"):
        lm.fitted(Drops({Point(0, "attention"): Drop(DROP, dict(enumerate(forms["mean"][:3])))}))


def test_predictors_are_ridge_regressions_by_hand() -> None:
    model = planned("llama", tp=4, layers=1)
    student, feed = model.students[0], Feed(model, sequences(24), batch_size=4)
    train, kept = feed.batches[:-1], feed.batches[-1:]
    assert (feed.fitting, feed.choosing) == (train, kept)
    found = HeadMoments.of(student, feed)
    fitted = found.fitting

    def raw(batches):
        z = torch.cat([torch.cat(student.block.attend(b.planned, **b.kwargs[0])[1], -1)[b.mask] for b in batches])
        return z.detach().double()

    z, o = raw(train), student.parts.o.weight.double().T
    assert torch.allclose(fitted.mean, z.mean(0)) and torch.allclose(fitted.covariance, torch.cov(z.T, correction=0))
    forms = [PredictorForm("mean"), PredictorForm("low_rank", 3), PredictorForm("full")]
    fits = {f.form.kind: f for f in predictor_fit.fit(student, found, forms=forms)}
    left = dict.fromkeys(fits, 0.0)
    missed = 0.0
    for rank in range(4):
        own = slice(rank * 16, (rank + 1) * 16)
        z_held = raw(kept)
        target = z @ o - z[:, own] @ o[own]
        target_held = z_held @ o - z_held[:, own] @ o[own]
        missed += target_held.square().sum().item()
        centred, y = z[:, own] - z[:, own].mean(0), target - target.mean(0)
        predictors = {k: f.predictors[rank] for k, f in fits.items()}
        assert torch.allclose(predictors["mean"].bias.double(), target.mean(0), atol=1e-5)
        options = []
        for ridge in predictor_fit.RIDGES:
            c = centred.T @ centred / len(z)
            c = c + ridge * c.diagonal().mean() * torch.eye(16)
            w = torch.linalg.solve(c, centred.T @ y / len(z))
            options.append((w, c))
        full = min(
            options,
            key=lambda t: (
                (z_held[:, own] @ t[0] + target.mean(0) - z[:, own].mean(0) @ t[0] - target_held).square().sum()
            ),
        )[0]
        assert torch.allclose(predictors["full"].w.double(), o[own] + full, atol=1e-4)
        slopes = []
        for w, c in options:
            vectors = torch.linalg.eigh(w.T @ c @ w).eigenvectors
            v = vectors[:, -3:]
            slopes.append(w @ v @ v.T)
        got = predictors["low_rank"].a.double() @ predictors["low_rank"].b.double()
        assert min((got - s).abs().max() for s in slopes) < 1e-4
        for kind, p in predictors.items():
            zo = z_held[:, own].float()
            predicted = p(zo, zo @ o[own].float()) - zo @ o[own].float()
            left[kind] += (predicted.double() - target_held).square().sum().item()
    for kind, fit in fits.items():
        assert fit.left == pytest.approx(left[kind] / missed, rel=1e-3)
    assert fits["full"].left <= fits["low_rank"].left <= fits["mean"].left


def test_the_ladder_and_the_choice_by_weights_read() -> None:
    assert [str(f) for f in forms_up_to(0, d_rank=16)] == ["mean"]
    assert [str(f) for f in forms_up_to(3, d_rank=16)] == ["mean", "rank 1", "rank 2", "rank 3"]
    assert [str(f) for f in forms_up_to(None, d_rank=8)] == ["mean", "rank 1", "rank 2", "rank 4", "full"]
    fits = [
        predictor_fit.Fit(f, {}, left)
        for f, left in zip(forms_up_to(None, d_rank=8), (0.9, 0.7, 0.69, 0.68, 0.67), strict=True)
    ]

    def chosen(exchange: float) -> str:
        return str(predictor_fit.choose(fits, d_rank=8, d=64, block_weights=10_000, exchange=exchange).form)

    assert chosen(1.0) == "rank 2"
    assert chosen(0.0) == "full"
    assert chosen(1e9) == "mean"
