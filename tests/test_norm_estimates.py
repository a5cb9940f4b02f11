"""What ranks read behind a norm: the fit by hand, the block by hand, and from a profile to the plan's file."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoTokenizer

from spd_calib.api.norm_estimates import with_estimates
from spd_calib.api.options import RunOptions
from spd_calib.api.plan import plan_with_details
from spd_calib.api.profile import profile
from spd_calib.api.text import TextSelection
from spd_calib.errors import InputError
from spd_calib.formats.drops import NOTHING_DROPPED, Drop, Drops, Point, Strategy
from spd_calib.models.plan_files import load_plan
from spd_calib.models.predictor import Predictor
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.parallel.streams import in_full
from spd_calib.planning.budget_options import BudgetOptions
from spd_calib.sensitivity.measure import Subject, measure
from spd_calib.sensitivity.norm_estimates import fit_estimates

DROP = Strategy.BLOCK_DROP
SEQUENCES = [tiny.tokens(1, n, seed=n)[0].tolist() for n in (12, 9, 16, 12)]


def seen_by(model, ids) -> dict:
    """What enters each block's o_proj and down_proj in transformers' own forward, [T, width], by (block, name)."""
    seen, hooks = {}, []
    for i, layer in enumerate(model.model.layers):
        for name, linear in (("attention", layer.self_attn.o_proj), ("mlp", layer.mlp.down_proj)):

            def keep(module, args, key=(i, name)):
                seen[key] = args[0][0]

            hooks.append(linear.register_forward_pre_hook(keep))
    with torch.no_grad():
        model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("family", ["gemma2", "hyperclovax"])
def test_scale_and_mean_are_a_regression_channel_by_channel(family):
    """Of both sync points, padding left out; biases are inside the norm, a scalar behind it."""
    more = tiny.NORMS_AND_SCALE if family == "hyperclovax" else {}
    model, tp = tiny.build(family, **more), 2
    lm = TensorParallelLM.simulated(tiny.build(family, **more), tp)
    found = fit_estimates(lm, SEQUENCES, batch_size=3)
    assert found.points == tuple(Point(b, kind) for b in range(4) for kind in ("attention", "mlp"))[:-1]
    scale = 0.4 if family == "hyperclovax" else 1.0
    inputs = [seen_by(model, ids) for ids in SEQUENCES]
    for block, kind in ((0, "attention"), (1, "mlp"), (3, "attention")):
        layer = model.model.layers[block]
        names = ("post_norm1", "post_norm2") if family == "hyperclovax" else ()
        norms = names or ("post_attention_layernorm", "post_feedforward_layernorm")
        norm = layer.get_submodule(norms[kind == "mlp"])
        linear = layer.self_attn.o_proj if kind == "attention" else layer.mlp.down_proj
        z = torch.cat([seen[block, kind] for seen in inputs])
        bias = 0.0 if linear.bias is None else linear.bias
        with torch.no_grad():
            whole = scale * norm(z @ linear.weight.T + bias)
            for rank in range(tp):
                own = slice(rank * z.shape[1] // tp, (rank + 1) * z.shape[1] // tp)
                share = scale * norm(z[:, own] @ linear.weight[:, own].T + bias)
                predictor = found.at(Point(block, kind)).predictors[rank]
                for c in (0, 5, 63):
                    x = torch.stack([share[:, c], torch.ones(len(share))], 1).double()
                    slope, mean = torch.linalg.lstsq(x, whole[:, c : c + 1].double()).solution.flatten()
                    assert predictor.scale[c].item() == pytest.approx(slope.item(), rel=1e-3, abs=1e-4)
                    assert predictor.bias[c].item() == pytest.approx(mean.item(), rel=1e-3, abs=1e-4)


def test_the_mlps_read_the_estimate_and_the_stream_gets_the_exact_sums():
    """The first block of Gemma 3 by hand: y = x + A(a_0 + a_1) + M(m_0 + m_1), m_i of x + (s_i A(a_i) + c_i)."""
    model, ids = tiny.build("gemma3"), tiny.tokens(1, 7)
    lm = TensorParallelLM.simulated(tiny.build("gemma3"), 2)
    layer, z = model.model.layers[0], seen_by(model, ids[0].tolist())[0, "attention"]
    generator = torch.Generator().manual_seed(0)
    of_ranks = {
        r: Predictor(0.3 * torch.randn(64, generator=generator), scale=torch.rand(64, generator=generator))
        for r in range(2)
    }
    with torch.no_grad():
        x = model.model.embed_tokens(ids)[0]
        a = [z[:, 32 * r : 32 * r + 32] @ layer.self_attn.o_proj.weight[:, 32 * r : 32 * r + 32].T for r in range(2)]
        m = []
        for r in range(2):
            estimate = of_ranks[r].scale * layer.post_attention_layernorm(a[r]) + of_ranks[r].bias
            u, n = layer.pre_feedforward_layernorm(x + estimate), slice(64 * r, 64 * r + 64)
            act = layer.mlp.act_fn(u @ layer.mlp.gate_proj.weight[n].T) * (u @ layer.mlp.up_proj.weight[n].T)
            m.append(act @ layer.mlp.down_proj.weight[:, n].T)
        y = x + layer.post_attention_layernorm(a[0] + a[1]) + layer.post_feedforward_layernorm(m[0] + m[1])
    drops, point = Drops({Point(0, "attention"): Drop(DROP, of_ranks)}), Point(0, "attention")
    with lm.running(drops):
        assert torch.allclose(lm.record(ids).streams[1].shared[0], y, atol=1e-5)
        explicit = lm(ids)
    lm.estimates = drops
    with lm.running(Drops.of({point: DROP})):  # where the drops name none, the model's own are read
        assert torch.equal(lm(ids), explicit)
    with lm.running(Drops({point: Drop(DROP, {r: Predictor(torch.zeros(64)) for r in range(2)})})):
        naive = lm(ids)
    lm.estimates = NOTHING_DROPPED
    with lm.running(Drops.of({point: DROP})):
        assert torch.allclose(lm(ids), naive, atol=1e-6) and not torch.allclose(naive, explicit, atol=1e-3)


def test_the_next_block_reads_the_estimate_of_an_mlp():
    """Gemma 3, by hand: the ranks read x + A(a) + (s_i M(m_i) + c_i), where M(m_0 + m_1) is to join x + A(a)."""
    model, ids = tiny.build("gemma3"), tiny.tokens(1, 7)
    lm = TensorParallelLM.simulated(tiny.build("gemma3"), 2)
    layer, seen = model.model.layers[0], seen_by(model, ids[0].tolist())
    of_ranks = {r: Predictor(torch.full((64,), 0.5 + r), scale=torch.linspace(0, 1 + r, 64)) for r in range(2)}
    with torch.no_grad():
        x = model.model.embed_tokens(ids)[0] + layer.post_attention_layernorm(
            seen[0, "attention"] @ layer.self_attn.o_proj.weight.T
        )
        act = seen[0, "mlp"]
        m = [act[:, 64 * r : 64 * r + 64] @ layer.mlp.down_proj.weight[:, 64 * r : 64 * r + 64].T for r in range(2)]
        norm = layer.post_feedforward_layernorm
        read = [x + of_ranks[r].scale * norm(m[r]) + of_ranks[r].bias for r in range(2)]
        whole = x + norm(m[0] + m[1])
    with lm.running(Drops({Point(0, "mlp"): Drop(DROP, of_ranks)})):
        behind = lm.record(ids).streams[1]
    assert all(torch.allclose(behind.read(r)[0], read[r], atol=1e-5) for r in range(2))
    assert torch.allclose(in_full(behind)[0], whole, atol=1e-5) and not torch.allclose(read[0], read[1], atol=1e-2)


def test_predictors_of_an_mlp_without_a_norm_are_refused():
    lm = TensorParallelLM.simulated(tiny.build("llama"), 2)
    assert fit_estimates(lm, SEQUENCES) == NOTHING_DROPPED
    wrong = Drops({Point(0, "mlp"): Drop(DROP, {r: Predictor(torch.zeros(64)) for r in range(2)})})
    with pytest.raises(InputError, match=r"^Block 0 has predictors for its MLP's partial sums, and no norm"):
        lm.fitted(wrong)


def test_from_a_profile_to_a_plan_and_back(tmp_path: Path):
    """The plan's file alone gives what was measured: fitted estimates, at both kinds of sync point."""
    folder = tiny.save(tiny.build("gemma3"), tmp_path / "model")
    text = tiny.write_jsonl(tmp_path / "text.jsonl", tiny.stories(24))
    lengths = TextSelection(seq_len=24, max_samples=12, verify_samples=6)
    found = profile(
        str(folder), tp=2, data=str(text), text=lengths, strategies=["block_drop"], sync_points=["attention", "mlp"],
        run=RunOptions(device="cpu", batch_size=4),
    )  # fmt: skip
    assert [str(p) for p in found.estimated][:2] == ["block 0", "block 0 MLP"] and len(found.estimated) == 7
    result = plan_with_details(found, BudgetOptions(drop=6), run=RunOptions(device="cpu", batch_size=4))
    result.write(tmp_path / "plan.json")
    plan, drops = load_plan(tmp_path / "plan.json")
    assert plan.requires == ["mlp_drop", "compensation"] and len(drops) == 6
    assert all(drop.predictors is not None for drop in drops.by_point.values())
    lm = TensorParallelLM.simulated(tiny.build("gemma3"), 2)
    lm.estimates = drops
    kept = {"mlp_strategy": Strategy.KEEP_SYNC, "mlp_compensation": None, "compensation": None}
    plain = [b.model_copy(update={**kept, "strategy": Strategy.PLAIN_DROP}) for b in plan.blocks]
    without = plan.model_copy(update={"blocks": plain, "requires": [], "compensation": None})
    assert with_estimates(without, Subject(lm)) == (without, None)  # what is written off waits for nothing
    lm.estimates = NOTHING_DROPPED
    tokenizer = AutoTokenizer.from_pretrained(folder)
    verifying = [json.loads(line)["text"] for line in text.read_text().splitlines()[12:18]]
    sequences = [tokenizer(document)["input_ids"][:24] for document in verifying]
    _, (loaded, naive) = measure(
        Subject(lm), sequences, plans=[drops, Drops.of(dict.fromkeys(drops, DROP))], batch_size=4
    )
    assert loaded.kl == pytest.approx(plan.verified.kl, rel=1e-3) and loaded.kl < naive.kl
