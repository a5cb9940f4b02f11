"""One function written in two forms: every number about it is the same.

Granite's scaled branches are a Llama whose o_proj and down_proj are scaled; Phi-3's fused layers are a Llama's, put
behind each other. What is measured and fitted of the one must be that of the other.
"""

import pytest
import tiny
import torch
from planned_models import sequences
from transformers import PreTrainedModel

from spd_calib.formats.drops import Drops, Point, Strategy
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.recovery import predictor_fit
from spd_calib.recovery.feed import Feed
from spd_calib.recovery.moments import HeadMoments
from spd_calib.recovery.neuron_grouping import group_neurons, neuron_costs
from spd_calib.recovery.planned_model import PlannedModel
from spd_calib.recovery.predictor_fit import PredictorForm
from spd_calib.sensitivity.fisher import predict

KEEP, DROP, PLAIN = Strategy.KEEP_SYNC, Strategy.BLOCK_DROP, Strategy.PLAIN_DROP
MIXED = Drops.of_blocks((DROP, PLAIN, KEEP, DROP), (DROP, KEEP, DROP, KEEP))
ATTENTIONS = Drops.of({Point(i, "attention"): DROP for i in range(4)})
SCALE = 0.4


def granite() -> tuple[PreTrainedModel, PreTrainedModel]:
    model = tiny.build("granite", embedding_multiplier=1.0, logits_scaling=1.0, attention_multiplier=8**-0.5)
    llama, state = tiny.build("llama_bias"), model.state_dict()
    scaled = ("o_proj.weight", "o_proj.bias", "down_proj.weight", "down_proj.bias")
    llama.load_state_dict({n: t * SCALE if n.endswith(scaled) else t for n, t in state.items()})
    return model, llama


def phi3() -> tuple[PreTrainedModel, PreTrainedModel]:
    model = tiny.build("phi3", rms_norm_eps=1e-6)
    llama, state = tiny.build("llama"), {}
    for name, tensor in model.state_dict().items():
        for fused, names, sizes in (
            ("qkv_proj", ("q_proj", "k_proj", "v_proj"), (64, 16, 16)),
            ("gate_up_proj", ("gate_proj", "up_proj"), (128, 128)),
        ):
            if fused in name:
                state |= {name.replace(fused, n): t for n, t in zip(names, tensor.split(sizes), strict=True)}
        if "qkv_proj" not in name and "gate_up_proj" not in name:
            state[name] = tensor
    llama.load_state_dict(state)
    return model, llama


PAIRS = {"granite": granite, "phi3": phi3}


@pytest.mark.parametrize("pair", PAIRS)
def test_logits_of_a_mixture(pair):
    one, other = (TensorParallelLM.simulated(model, 4) for model in PAIRS[pair]())
    ids = tiny.tokens(2, 12)
    with one.running(MIXED), other.running(MIXED):
        assert (one(ids) - other(ids)).abs().max() < 1e-5


@pytest.mark.parametrize("pair", PAIRS)
def test_fisher_estimates(pair):
    found = [
        predict(TensorParallelLM.simulated(model, 2), sequences(6), sync_points=["attention", "mlp"], target_stderr=0.3)
        for model in PAIRS[pair]()
    ]
    one, other = (torch.tensor([kl for row in fisher.matrix for kl in row]) for _, fisher in found)
    assert one.max() > 1e-3
    assert torch.allclose(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("pair", PAIRS)
def test_predictors_and_groups_of_neurons(pair):
    models = [PlannedModel(model, 4, ATTENTIONS) for model in PAIRS[pair]()]
    fits, costs, weights = [], [], []
    for model in models:
        student, feed = model.students[1], Feed(model, sequences(24), batch_size=4)
        forms = [PredictorForm("mean"), PredictorForm("low_rank", 3), PredictorForm("full")]
        fits.append(predictor_fit.fit(student, HeadMoments.of(student, feed), forms=forms))
        cost = neuron_costs(student, feed, feed.fitting)
        costs.append(torch.from_numpy(cost / cost.sum()))
        group_neurons(student, feed, feed.fitting)
        down = student.parts.down.weight.detach()
        weights.append(down * student.parts.scale)
    assert torch.allclose(*costs, rtol=1e-3)
    assert torch.allclose(*weights, atol=1e-6), "the same neurons in the same order"
    for one, other in zip(*fits, strict=True):
        assert one.left == pytest.approx(other.left, rel=1e-3) and one.left < 1
        for rank in range(4):
            z, partial = torch.randn(5, 16), torch.randn(5, 64)
            assert torch.allclose(one.predictors[rank](z, partial), other.predictors[rank](z, partial), atol=1e-3)
