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
from spd_calib.recovery.refit import _before_norm


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
    """Grouping, predictors and refit, that of down_proj behind a norm among them."""
    model = planned("gemma3", tp=4, layers=2)
    options = RecoveryOptions(methods=("grouping", "compensation", "refit"), batch_size=4)
    report = recover(model, fitting=sequences(16), held_out=sequences(6, seed=1), tiers=extreme(model), options=options)
    assert report.kl < 0.8 * report.kl_as_is
    assert all(p.scale is not None for s in model.students.values() for p in (s.predictors or {}).values())
    assert any(s.predictors for s in model.students.values())
    refitted = [a for a in report.attempts if a.treatment == "refit of down"]
    assert len(refitted) == 2 and any(a.kept for a in refitted)


def test_behind_a_norm_a_small_error_is_mapped_back_to_first_order() -> None:
    norm = torch.nn.RMSNorm(6)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -2.0, 0.5, 3.0, 1e-6, 1.0]))
        total = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
        change = 1e-4 * torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
        total[:, 4] = change[:, 4] = 0.0  # which the norm all but cuts off
        rms = total.square().mean(-1, keepdim=True).sqrt()
        change -= total * (total * change).mean(-1, keepdim=True) / rms**2  # the size stays
        missing, weights = _before_norm(norm(total + change) - norm(total), torch.ones(5), norm=norm, of=total)
    assert torch.allclose(missing, change, atol=2e-6) and torch.allclose(weights, 1 / rms[:, 0] ** 2)
