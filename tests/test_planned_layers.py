"""vLLM's planned layers, compiled: what they compute, and that a dropped sync point leaves no kernel behind.

The layers are stand-ins with the parts of vLLM's own; attention and all-reduce are operators that no compiler sees
into, as in vLLM. tests/with_vllm runs the same forwards in vLLM.
"""

import re
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from spd_calib.formats.drops import Drop, Strategy
from spd_calib.runtimes.planned import Planned
from spd_calib.runtimes.projections import Projection
from spd_calib.runtimes.vllm import forwards, norm_forwards
from spd_calib.runtimes.vllm.forwards import Parts, fused
from spd_calib.runtimes.vllm.mixtures import open_mixture
from spd_calib.runtimes.vllm.norm_forwards import behind_norms, sandwich
from spd_calib.runtimes.vllm.projections import ending_before

K, D, P = (Drop(s) for s in (Strategy.KEEP_SYNC, Strategy.BLOCK_DROP, Strategy.PLAIN_DROP))
D_MODEL, HEADS, NEURONS, TOKENS = 32, 16, 48, 5
KERNEL = re.compile(r"^ +(?:\w+ = )?(cpp_fused\w*|extern_kernels\.\w+|torch\.ops\.[\w.]+?)(?:\.default)?\(", re.M)


@torch.library.custom_op("spd_calib_tests::all_reduce", mutates_args=())
def all_reduce(partial: Tensor) -> Tensor:
    return 2 * partial  # as if another rank had the same


@torch.library.custom_op("spd_calib_tests::attention", mutates_args=())
def attention(u: Tensor) -> Tensor:
    return u[:, :HEADS].cumsum(0)


all_reduce.register_fake(torch.empty_like)
attention.register_fake(lambda u: u.new_empty(u.shape[0], HEADS))


class Norm(nn.Module):
    """vLLM's: with a residual it gives the norm of the sum, and the sum."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(D_MODEL) + 0.5)

    def forward(self, x, residual=None):
        total = x if residual is None else x + residual
        normed = self.weight * total * (total.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        return normed if residual is None else (normed, total)


class Linear(nn.Module):
    """What is used of vLLM's RowParallelLinear; this is rank 0 of 2."""

    return_bias, params_dtype = True, torch.float32

    def __init__(self, inputs: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D_MODEL, inputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.randn(D_MODEL)) if bias else None
        self.quant_method = SimpleNamespace(apply=lambda linear, z, b: nn.functional.linear(z, linear.weight, b))

    def forward(self, z):
        return all_reduce(self.quant_method.apply(self, z, self.bias)), None


class Layer(nn.Module):
    def __init__(self, bias: bool):
        super().__init__()
        self.norm1, self.norm2 = Norm(), Norm()
        self.o, self.down = Linear(HEADS, bias), Linear(NEURONS, bias)
        self.up = nn.Linear(D_MODEL, NEURONS, bias=False)

    def self_attn(self, positions, hidden_states):
        return self.o(attention(hidden_states))[0]

    def mlp(self, u):
        return self.down(torch.relu(self.up(u)))[0]

    def forward(self, positions, hidden_states, residual):
        """As vLLM's own."""
        u, x = self.norm1(hidden_states, residual)
        u, x = self.norm2(self.self_attn(positions, u), x)
        return self.mlp(u), x


class Layers(nn.Module):
    """Layers of which each runs its part of a plan, its own forward where that is None; and the last norm."""

    def __init__(self, plan, *, bias: bool, in_place: bool):
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.norm, owes = nn.ModuleList(Layer(bias) for _ in plan), Norm(), False
        for layer, drops in zip(self.layers, plan, strict=True):
            if drops is None:
                continue
            parts = Parts(
                layer.norm1,
                layer.norm2,
                *(Projection(part, rank=0, in_place=in_place) for part in (layer.o, layer.down)),
            )
            for part in (layer.o, layer.down):
                part.forward = ending_before(part)
            layer.forward = fused(layer, parts, Planned(*drops, owes=owes))
            owes = drops[1] is not K

    def forward(self, hidden, residual):
        for layer in self.layers:
            hidden, residual = layer(None, hidden, residual)
        return self.norm(hidden, residual)[0]


@pytest.fixture(autouse=True)
def two_ranks(monkeypatch):
    monkeypatch.setattr(forwards, "all_reduced", all_reduce)
    monkeypatch.setattr(norm_forwards, "all_reduced", all_reduce)
    torch.compiler.reset()


def streams():
    return torch.randn(2, TOKENS, D_MODEL, generator=torch.Generator().manual_seed(1)).unbind()


def kernels(model) -> list[str]:
    """The kernels that a compiled forward calls, in order."""
    from torch._inductor import config
    from torch._inductor.utils import run_and_get_code

    with torch.no_grad(), config.patch(enable_auto_functionalized_v2=False):  # as vLLM compiles
        _, (code,) = run_and_get_code(torch.compile(model, fullgraph=True), *streams())
    return KERNEL.findall(code[code.index("def call(") :])


@pytest.mark.parametrize("bias", [False, True])
def test_a_dropped_sync_point_leaves_no_kernel_behind(bias):
    """Where an engine has one kernel for an all-reduce and the norm behind it, a dropped one leaves the norm alone."""
    kept, dropped = (kernels(Layers([own] * 2, bias=bias, in_place=True)) for own in (None, (D, K)))
    assert [sum("all_reduce" in name for name in found) for found in (kept, dropped)] == [4, 2]
    assert len(dropped) == len(kept) - 2, (kept, dropped)
    assert dropped.count("torch.ops.spd_calib.add_product_") == 2
    assert "extern_kernels.addmm" not in dropped  # which copies the debt before it adds to it


@pytest.mark.parametrize("plan", [[(D, K)] * 2, [(D, D), (K, K)]])
def test_what_is_reduced_goes_straight_into_a_norm(plan):
    """As vLLM's kernel for both wants it: no bias in between."""
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        torch.compile(Layers(plan, bias=True, in_place=True), backend=keep, fullgraph=True)(*streams())
    reduced = [node for node in graphs[0].graph.nodes if "all_reduce" in str(node.target)]
    assert len(reduced) == 2
    for node in reduced:
        (norm,) = node.users
        assert [tuple(given.meta["example_value"].shape) for given in norm.args] == [(TOKENS, D_MODEL)] * 2


@pytest.mark.parametrize("plan", [[(D, K)] * 2, [(D, D), (K, K)], [(P, D), (P, K)], [(K, D), (D, K)], [(D, D), (D, K)]])
@pytest.mark.parametrize("bias", [False, True])
def test_in_place_is_the_same_sum(plan, bias):
    given = streams()
    with torch.inference_mode():
        plain = Layers(plan, bias=bias, in_place=False)(*given)
        in_place = Layers(plan, bias=bias, in_place=True)
        torch.testing.assert_close(in_place(*given), plain)
        torch.testing.assert_close(torch.compile(in_place, fullgraph=True)(*given), plain)
    torch.testing.assert_close(given, streams())  # nobody's tensor but their own was written to


class LayersBehindNorms(nn.Module):
    """Layers of Gemma 2's kind, whose branches go through a norm, and the last norm."""

    def __init__(self, plan):
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.norm, owes = nn.ModuleList(Layer(bias=True) for _ in plan), Norm(), False
        self.out_norms = nn.ModuleList(nn.ModuleList([Norm(), Norm()]) for _ in plan)
        for i, (layer, out_norms, drops) in enumerate(zip(self.layers, self.out_norms, plan, strict=True)):
            for part in (layer.o, layer.down):
                part.forward = ending_before(part)
            parts = Parts(
                layer.norm1, layer.norm2, Projection(layer.o, rank=0), Projection(layer.down, rank=0), *out_norms
            )
            planned = Planned(*drops, owes=owes, last=i == len(plan) - 1)
            layer.forward = behind_norms(sandwich)(layer, parts, planned)
            owes = drops[1] is not K

    def forward(self, hidden):
        residual = None
        for layer in self.layers:
            hidden, residual = layer(None, hidden, residual)
        return self.norm(hidden, residual)[0]

    def naive(self, plan, x):
        """The same by the definition: partial sums wait, ranks read A(partial) for them; this rank's are everyone's."""
        waiting = []
        for layer, (norm_a, norm_m), drops in zip(self.layers, self.out_norms, plan, strict=True):
            sub_layers = (
                (norm_a, layer.o, lambda u, layer=layer: attention(layer.norm1(u))),
                (norm_m, layer.down, lambda u, layer=layer: torch.relu(layer.up(layer.norm2(u)))),
            )
            for drop, (norm, linear, inner) in zip(drops, sub_layers, strict=True):
                read = x + sum(own(partial + bias) for own, partial, bias in waiting)
                waiting.append((norm, inner(read) @ linear.weight.T, linear.bias))
                if drop is K:
                    x, waiting = x + sum(own(2 * partial + bias) for own, partial, bias in waiting), []
        return self.norm(x)


@pytest.mark.parametrize("plan", [[(D, K), (K, K)], [(D, D), (D, K)], [(K, D), (K, D), (D, K)]])
def test_sums_behind_norms_wait_side_by_side(plan):
    layers, (x, _) = LayersBehindNorms(plan), streams()
    with torch.no_grad():
        expected = layers.naive(plan, x)
        torch.testing.assert_close(layers(x), expected)
        torch.testing.assert_close(torch.compile(layers, fullgraph=True, backend="aot_eager")(x), expected)


class Experts(nn.Module):
    """What is used of vLLM's runner: two of three experts for each token, with biases, which rank 0 adds."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, D_MODEL, D_MODEL) / D_MODEL**0.5)
        self.routed_experts = SimpleNamespace(w2_bias=torch.randn(3, D_MODEL))
        self.router = SimpleNamespace(_compute_routing=lambda u, logits, _: logits.softmax(-1).topk(2))

    def forward(self, u, logits):
        weights, chosen = self.router._compute_routing(u, logits, None)
        outs = torch.einsum("nkoi,ni->nko", self.weight[chosen], u) + self.routed_experts.w2_bias[chosen]
        return (weights[..., None] * outs).sum(1)


class LayerOfExperts(Layer):
    def __init__(self):
        super().__init__(bias=False)
        self.router, self.experts = nn.Linear(D_MODEL, 3), Experts()


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_biases_of_experts_join_the_shared_stream_where_their_sum_waits(scale):
    """Both sync points dropped, behind the last layer's norm: the debt is the partial sums alone, of each once."""
    torch.manual_seed(0)
    layer, (hidden, residual) = LayerOfExperts(), streams()
    mixture = open_mixture(layer, gate="router", rank=0, scale=scale)
    layer.o.forward = ending_before(layer.o)
    forward = fused(layer, Parts(layer.norm1, layer.norm2, Projection(layer.o, rank=0), mixture), Planned(D, D))
    with torch.no_grad():
        debt, shared = torch.compile(forward, fullgraph=True, backend="aot_eager")(None, hidden, residual)
        x = hidden + residual
        a = attention(layer.norm1(x)) @ layer.o.weight.T
        read, chooses = layer.norm2(x + a), layer.norm2(x)
        experts = layer.experts
        for token in range(TOKENS):
            shares = layer.router(chooses[token]).softmax(-1)
            best = sorted(range(3), key=lambda e: -shares[e])[:2]
            partial = sum(shares[e] * (experts.weight[e] @ read[token]) for e in best)
            bias = sum(shares[e] * experts.routed_experts.w2_bias[e] for e in best)
            torch.testing.assert_close(debt[token], a[token] + scale * partial)
            torch.testing.assert_close(shared[token], x[token] + scale * bias)
