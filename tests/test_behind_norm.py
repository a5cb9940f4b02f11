"""Predictors behind a norm: weighted regressions by hand, and a recovery of such a model."""

import pytest
import torch
from planned_models import extreme, planned, sequences

from spd_calib.recovery import behind_norm
from spd_calib.recovery.behind_norm import fit_behind_norm
from spd_calib.recovery.feed import Feed
from spd_calib.recovery.options import RecoveryOptions
from spd_calib.recovery.predictor_fit import PredictorForm
from spd_calib.recovery.recover import recover


def test_predictors_are_weighted_regressions_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Channel by channel on [share, z, 1], with no ridge, of raw activations in transformers' own modules."""
    monkeypatch.setattr(behind_norm, "RIDGES", (0.0,))
    model = planned("gemma3", tp=2, layers=1)
    student, feed = model.students[0], Feed(model, sequences(16), batch_size=2)
    layer, norm = student.layer, student.layer.post_attention_layernorm
    rows = []
    for batch in feed.fitting:
        z: list[torch.Tensor] = []
        hook = layer.self_attn.o_proj.register_forward_pre_hook(lambda m, args, z=z: z.append(args[0]))
        with torch.no_grad():
            h = batch.dense + norm(
                layer.self_attn(hidden_states=layer.input_layernorm(batch.dense), **batch.kwargs[0])[0]
            )
        hook.remove()
        rows.append((z[0][batch.mask], h[batch.mask], batch.dense[batch.mask]))
    z_all, h, x = (torch.cat(column) for column in zip(*rows, strict=True))
    forms = [PredictorForm("mean"), PredictorForm("full")]
    mean, full = (fit.predictors for fit in fit_behind_norm(student, feed, forms=forms))
    weights = (1 / h.square().mean(-1)).sqrt()[:, None].double()
    for rank in range(2):
        own = slice(32 * rank, 32 * rank + 32)
        with torch.no_grad():
            share = norm(z_all[:, own] @ layer.self_attn.o_proj.weight[:, own].T)
        for c in (0, 7, 63):
            one, target = torch.ones(len(x), 1), (h - x)[:, c : c + 1].double()
            for features, found in (
                ([share[:, c : c + 1], one], mean),
                ([share[:, c : c + 1], one, z_all[:, own]], full),
            ):
                a = torch.cat(features, 1).double()
                exact = torch.linalg.lstsq(a * weights, target * weights).solution[:, 0]
                got = found[rank]
                assert got.scale[c].item() == pytest.approx(exact[0].item(), rel=1e-2, abs=1e-3)
                assert got.bias[c].item() == pytest.approx(exact[1].item(), rel=1e-2, abs=1e-3)
                if got.w is not None:
                    assert torch.allclose(got.w[:, c].double(), exact[2:], atol=1e-3)


def test_a_model_with_norms_behind_its_branches_is_recovered() -> None:
    """Grouping, predictors and refit; down_proj, behind which a norm stands, is left as it is."""
    model = planned("gemma3", tp=4, layers=2)
    down = [s.parts.down.weight.norm() for s in model.students.values()]
    options = RecoveryOptions(methods=("grouping", "compensation", "refit"), batch_size=4)
    report = recover(model, fitting=sequences(16), held_out=sequences(6, seed=1), tiers=extreme(model), options=options)
    assert report.kl < 0.8 * report.kl_as_is
    assert all(p.scale is not None for s in model.students.values() for p in (s.predictors or {}).values())
    assert any(s.predictors for s in model.students.values())
    for norm, student in zip(down, model.students.values(), strict=True):  # its columns may be in another order
        assert torch.allclose(student.parts.down.weight.norm(), norm)
    assert not any(attempt.treatment == "refit of down" for attempt in report.attempts)
