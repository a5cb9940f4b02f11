"""Replicated heads: what a rank's MLP reads of other ranks' heads, against the dense model and the reference."""

import json
from types import SimpleNamespace

import pytest
import reference
import tiny
import torch
from distributed_cases import BEFORE_REPLICATED, BLOCKS, DROP, KEEP, REPLICATING, replicated, replicating
from plans import write_plan
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from spd_calib.errors import InputError
from spd_calib.formats.drops import Drop, Drops, Point
from spd_calib.formats.files import read
from spd_calib.formats.plan import Plan
from spd_calib.models.architecture import HeadCounts
from spd_calib.models.predictor import Predictor
from spd_calib.models.shard import RankLinear, slices_of_groups
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.planning.latency import Step
from spd_calib.planning.model_sizes import ModelSizes, added_by_heads, bytes_moved, flops
from spd_calib.runtimes.vllm import configure

A0 = Point(0, "attention")


def kv_heads(model) -> int:
    return getattr(model.config, "num_key_value_heads", model.config.num_attention_heads)


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


@pytest.mark.parametrize("family", [*REPLICATING, "hyperclovax", "llama_bias", "exaone4", "mistral_window"])
@pytest.mark.parametrize("tp", [2, 4])
def test_all_heads_give_the_dense_block_and_some_what_the_reference_says(family, tp):
    """Llama has two KV heads: at TP 4 two ranks share each."""
    dense, ids = tiny.build(family), tiny.tokens(2, 12)
    with torch.no_grad():
        expected = dense(ids).logits
    lm = TensorParallelLM.simulated(tiny.build(family), tp)
    every = replicated(tp, kv_heads(dense))[0]
    with lm.running(Drops({Point(b, "attention"): Drop(DROP, replicated=every) for b in range(BLOCKS)})):
        assert gap(lm(ids), expected) < 1e-5
    some = replicated(tp, kv_heads(dense))
    strategies = [[str(s) for s in row] for row in ([DROP] * BLOCKS, BEFORE_REPLICATED)]
    with lm.running(replicating(some)):
        found = lm(ids)
    assert gap(found, reference.logits(dense, ids, tp, *strategies, replicated=some)) < 1e-5
    assert gap(found, reference.logits(dense, ids, tp, *strategies)) > 0.1


@pytest.mark.parametrize("family", ["llama", "gemma2", "minicpm3"])
def test_the_cache_holds_them_beside_every_ranks_own(family):
    lm, ids = TensorParallelLM.simulated(tiny.build(family), 4), tiny.tokens(2, 9)
    lm.model.generation_config.eos_token_id = None
    with lm.running(replicating(replicated(4, kv_heads(lm.model)))):
        cached, again = (
            lm.model.generate(ids, do_sample=False, max_new_tokens=6, pad_token_id=0, use_cache=cache)
            for cache in (True, False)
        )
    assert torch.equal(cached, again)


def test_ranges_of_heads_are_as_long_as_one_attention_can_be():
    def ranges(heads: int, kv: int, tp: int, groups: list[int]) -> list[tuple[range, range]]:
        found = slices_of_groups(HeadCounts(heads, kv, 4, 8), groups, tp)
        return [tuple(range(s.start, s.stop) for s in (f.heads, f.kv_heads)) for f in found]

    assert ranges(8, 4, 2, [2, 3]) == [(range(4, 8), range(2, 4))]
    assert ranges(8, 4, 2, [0, 2]) == [(range(2), range(1)), (range(4, 6), range(2, 3))]
    assert ranges(16, 2, 8, [1, 2, 3]) == [(range(2, 8), range(1))]
    # a KV head for one range, another for the next: each serves as many query heads in it
    assert ranges(16, 2, 8, [2, 3, 4]) == [(range(4, 8), range(1)), (range(8, 10), range(1, 2))]


def test_a_predictor_sees_the_replicated_heads():
    """A full one made of o_proj's own columns, those of the heads that the rank has, changes nothing."""
    lm, ids = TensorParallelLM.simulated(tiny.build("opt"), 2), tiny.tokens(2, 6)
    groups = ((5, 7), (0, 2))
    columns = lm.blocks[0].parts.o.weight.T.detach().reshape(8, -1, 64)  # of each head
    w = [columns[[0, 1, 2, 3, 5, 7]].flatten(0, 1), columns[[4, 5, 6, 7, 0, 2]].flatten(0, 1)]

    def logits(predictors=None):
        with lm.running(Drops({A0: Drop(DROP, predictors, replicated=groups)})):
            return lm(ids)

    zero = torch.zeros(64)
    plain = logits()
    assert gap(logits({r: Predictor(zero, w=w[r].clone()) for r in (0, 1)}), plain) < 1e-5
    assert gap(logits({r: Predictor(torch.randn(64)) for r in (0, 1)}), plain) > 1e-2
    with pytest.raises(InputError, match="does not fit the model's heads"):
        logits({r: Predictor(zero, w=w[r][:-1].clone()) for r in (0, 1)})


@pytest.mark.parametrize(("family", "tp"), [("llama", 2), ("llama", 4), ("opt", 4)])
def test_what_they_take_is_what_the_account_says(family, tp):
    """Weights and cached numbers counted where a rank holds them, products where they are made, in a step of decode."""
    model, ids, past = tiny.build(family), tiny.tokens(1, 9), 8
    model.set_attn_implementation("eager")  # whose products are counted
    lm = TensorParallelLM.simulated(model, tp)
    sizes, groups = ModelSizes.of(tiny.build(family)), replicated(tp, kv_heads(lm.model))[2]
    step = Step("decode", batch=1, context=past + 1, itemsize=2)  # the token itself is in the cache when it is attended
    added = added_by_heads(sizes, groups, tp=tp)

    def products(drops) -> int:
        with torch.no_grad(), lm.running(drops):
            cache = lm.model(ids[:, :past], use_cache=True).past_key_values
            with FlopCounterMode(display=False) as counter:
                lm.model(ids[:, past:], past_key_values=cache)
        caches.append(cache)
        return counter.get_total_flops()

    caches: list = []
    more = Drops({A0: Drop(DROP, replicated=groups)})
    made = products(more) - products(Drops({A0: Drop(DROP)}))
    attentions = lm.blocks[0].replicas(groups).attentions
    numbers = [layer.keys.numel() + layer.values.numel() for layer in caches[0].layers if layer.get_seq_length()]
    assert sum(numbers[tp * BLOCKS :]) == sum(len(own) for own in attentions) / len(attentions[0]) * added.cached * 9
    held = [
        sum(_held(linear) for one in own for linear in one.modules() if isinstance(linear, RankLinear))
        for own in attentions
    ]
    assert max(held) == added.weights and made <= tp * flops_added(sizes, step, tp, added)
    if family == "llama":  # as much on every rank
        assert made == tp * flops_added(sizes, step, tp, added)
    moved = bytes_moved(sizes, step, tp=tp, added=added) - bytes_moved(sizes, step, tp=tp)
    assert moved == 2 * (added.weights + 9 * added.cached)


def test_a_latent_attention_takes_its_latents_once_more_for_each_range():
    """What makes them is whole on every rank, and so is the latent in the cache."""
    sizes, lm = ModelSizes.of(tiny.build("minicpm3")), TensorParallelLM.simulated(tiny.build("minicpm3"), 2)
    groups = replicated(2, kv_heads(lm.model))[2]
    added, (attentions, _) = added_by_heads(sizes, groups, tp=2), lm.blocks[0].replicas(groups).attentions
    linears = [linear for one in attentions for linear in one.modules() if isinstance(linear, RankLinear | nn.Linear)]
    held = sum(_held(x) if isinstance(x, RankLinear) else x.weight.numel() for x in linears)
    assert added.weights == held and added.cached == len(attentions) * sizes.latents > 0


def flops_added(sizes, step, tp, added) -> float:
    return flops(sizes, step, tp=tp, added=added) - flops(sizes, step, tp=tp)


def _held(linear: RankLinear) -> int:
    return sum(linear.weight[rows, linear.columns].numel() for rows in linear.rows)


def refusal(lm: TensorParallelLM, groups) -> str:
    with pytest.raises(InputError) as e, lm.running(Drops({A0: Drop(DROP, replicated=groups)})):
        pytest.fail("it runs")
    return str(e.value)


def test_what_cannot_be_replicated_is_refused_with_the_reason():
    both = ((1,), (0,))
    for family, why in (
        ("olmo2", "a sync of its own"),
        ("qwen3_5", "a linear attention"),
        ("mixtral", "router reads only what all ranks share"),
    ):
        assert why in refusal(TensorParallelLM.simulated(tiny.build(family), 2), both)
    lm = TensorParallelLM.simulated(tiny.build("llama"), 2)
    assert "do not fit 2 KV groups on 2 ranks" in refusal(lm, ((2,), (0,)))
    assert "do not fit" in refusal(lm, ((1,), (0,), (0,)))
    assert "on rank 1 that are its own" in refusal(lm, ((1,), (1,)))


def test_vllm_refuses_a_plan_that_replicates_heads(llama, tmp_path):
    """The same in vLLM itself: tests/with_vllm."""
    path = write_plan(tmp_path / "plan.json", llama, 2, ["block_drop"] * BLOCKS, replicated={1: ((1,), (0,))})
    plan = read(Plan, path)
    assert plan.drops.replicated == {1: ((1,), (0,))}
    with pytest.raises(InputError, match=r"requires .replicated_heads., which .* does not have: vLLM cuts"):
        configure.check(plan, path, config=SimpleNamespace(parallel_config=None, model_config=None))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"requires": []}, "says nothing, its blocks need replicated_heads"),
        ({"requires": ["replicated_heads"] * 2}, "says replicated_heads, replicated_heads, its blocks need"),
        ({"requires": ["replicated_heads", "mlp_drop"]}, "its blocks need replicated_heads"),
        ({"blocks": {"replicated": [[1]]}}, "names the KV groups of each rank"),
        ({"blocks": {"strategy": "keep_sync"}}, "go with block_drop"),
        ({"blocks": {"replicated": [[1], []]}}, "as many KV groups"),
    ],
)
def test_a_plan_file_that_means_nothing_is_refused(llama, tmp_path, changes, why):
    path = write_plan(tmp_path / "plan.json", llama, 2, ["block_drop"] * BLOCKS, replicated={1: ((1,), (0,))})
    document = json.loads(path.read_text())
    document["blocks"][1] |= changes.pop("blocks", {})
    path.write_text(json.dumps(document | changes))
    with pytest.raises(InputError, match=why):
        read(Plan, path)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Drop(KEEP, replicated=((1,), (0,))), "go with block_drop"),
        (lambda: Drop(DROP, replicated=((1,), ())), "as many KV groups"),
        (lambda: Drop(DROP, replicated=((), ())), "one at the least"),
        (lambda: Drop(DROP, replicated=((3, 2), (0, 1))), "in order"),
        (lambda: Drops({Point(0, "mlp"): Drop(DROP, replicated=((1,), (0,)))}), "only an attention"),
    ],
)
def test_drops_that_mean_nothing(make, why):
    with pytest.raises(ValueError, match=why):
        make()
