"""Plans on SGLang's layers: two real ranks against the definition; what is refused; and the stub against the source."""

import ast
import copy
import importlib.util
import inspect
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import reference
import sglang_stub
import tiny
import torch
from plans import write_plan
from predictors import KINDS, predictor
from two_processes import in_two_processes

from spd_calib.api.check import check
from spd_calib.errors import InputError
from spd_calib.formats.drops import NOTHING_DROPPED, Drop, Drops, Point, Strategy
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.runtimes.planned import Planned
from spd_calib.runtimes.sglang import configure, plugin
from spd_calib.runtimes.sglang.forms import FORMS, check_widths
from spd_calib.runtimes.sglang.forward import planned_forward
from spd_calib.runtimes.sglang.layers import apply
from spd_calib.runtimes.sglang.refusals import AS_MEASURED, not_as_measured

K, D, P = "keep_sync", "block_drop", "plain_drop"
PLANS = [
    ([K, K, K], [K, K, K]),
    ([D, D, D], [K, K, K]),
    ([K, D, K], [D, D, K]),
    ([D, K, D], [D, K, K]),
    ([P, D, P], [K, D, K]),
    ([D, P, K], [D, D, K]),
]
"""Strategies behind the attention and behind the MLP, one a block: each kind of point with and without a debt."""

BIASED = {"llama": {"attention_bias": True, "mlp_bias": False}}


def with_predictors(d_rank: int, d: int) -> Drops:
    """Three dropped sync points, each with predictors of another kind, and one that owes besides."""
    of = {
        Point(i, "attention"): Drop(
            Strategy.BLOCK_DROP, {rank: predictor(kind, d_rank, d, seed=2 * i + rank) for rank in range(2)}
        )
        for i, kind in enumerate(KINDS)
    }
    return Drops({**of, Point(1, "mlp"): Drop(Strategy.BLOCK_DROP)})


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_two_ranks_compute_what_the_definition_says(family, tmp_path):
    model = tiny.build(family, layers=3, vocab_size=132, **BIASED.get(family, {}))
    ids, config = tiny.tokens(1, 9), model.config
    heads = model.model.layers[0].self_attn.o_proj.in_features
    drops = with_predictors(heads // 2, config.hidden_size)
    lm = TensorParallelLM.simulated(copy.deepcopy(model), 2)
    with torch.no_grad(), lm.running(drops):
        predicted = lm(ids)[0]

    def on_rank(rank: int) -> None:
        served = sglang_stub.CausalLM(model)
        for attention, mlp in PLANS:
            apply(served, Drops.of_blocks(attention, mlp), rank=rank)
            sglang_stub.counted.clear()
            with torch.inference_mode():
                found = served(ids[0])
            torch.testing.assert_close(
                found, reference.logits(model, ids, 2, attention, mlp)[0].float(), atol=2e-5, rtol=1e-5
            )
            assert len(sglang_stub.counted) == sum(strategy == K for strategy in attention + mlp)
        apply(served, drops, rank=rank)
        with torch.inference_mode():
            torch.testing.assert_close(served(ids[0]), predicted, atol=2e-5, rtol=1e-5)
        apply(served, NOTHING_DROPPED, rank=rank)
        assert not any("forward" in vars(module) for module in served.modules()), "SGLang's own layers are back"

    in_two_processes(tmp_path / "port", on_rank)


@pytest.fixture
def alone(tmp_path):
    """This process as the one rank of a group."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def change(path: str, value):
    """What puts `value` at a path of attributes below a layer."""

    def to(layer) -> None:
        *names, last = path.split(".")
        for name in names:
            layer = getattr(layer, name)
        setattr(layer, last, value)

    return to


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (change("mlp.down_proj.reduce_results", True), "a projection of block 1 sums over the ranks itself"),
        (change("self_attn.o_proj.use_decode_attn_tp", True), "sums over the ranks itself"),
        (change("self_attn.o_proj.input_is_parallel", False), "reads what is gathered first"),
        (change("self_attn.o_proj.skip_bias_add", True), "leaves its bias to others"),
        (change("mlp.down_proj.quant_method", SimpleNamespace()), "is quantised"),
        (change("mlp.down_proj", torch.nn.Identity()), "the sync point of block 1 is not known"),
        (change("ffn_boundary", SimpleNamespace()), "sums over the ranks of block 1 by types.SimpleNamespace"),
        (change("attn_boundary.declaration", SimpleNamespace(row_transport=1)), "moves tokens between the ranks"),
        (change("forward", lambda *_: None), "has wrapped the forward of block 1's LlamaDecoderLayer"),
        (change("self_attn.o_proj.forward", lambda *_: None), "has wrapped the forward of block 1's RowParallelLinear"),
    ],
)
def test_layers_that_are_not_as_read_are_refused(changed, words, alone):
    served = sglang_stub.CausalLM(tiny.build("llama", layers=2))
    changed(served.model.layers[1])
    with pytest.raises(InputError, match=words):
        apply(served, Drops.of_blocks([D, D]), rank=0)
    assert "forward" not in vars(served.model.layers[0]), "refused before anything was changed"


def test_plans_that_do_not_fit_are_refused(alone):
    served = sglang_stub.CausalLM(tiny.build("llama", layers=2))
    width = served.model.layers[0].self_attn.o_proj.input_size_per_partition
    at = lambda **of: Drops({Point(0, "attention"): Drop(Strategy.BLOCK_DROP, **of)})  # noqa: E731
    for drops, words in (
        (Drops.of_blocks([K, K, D]), "does not fit the model that SGLang loaded"),
        (at(predictors={1: predictor("mean", width, 32, 0)}), "no predictor for rank 0"),
        (at(predictors={0: predictor("full", width, 32, 0)}, router=predictor("mean", 32, 32, 0)), "no layer of this"),
    ):
        with pytest.raises(InputError, match=words):
            apply(served, drops, rank=0)
    served.__class__ = type("OtherForCausalLM", (sglang_stub.CausalLM,), {"__module__": "sglang.srt.models.other"})
    with pytest.raises(InputError, match=r"loaded sglang.srt.models.other.OtherForCausalLM: its layers are not known"):
        apply(served, at(), rank=0)


def test_padded_projections_are_refused(alone):
    model = tiny.build("llama", layers=2)
    served = sglang_stub.CausalLM(model)
    check_widths(served, model.config, tp=1)
    served.model.layers[1].mlp.down_proj.input_size_per_partition += 32
    with pytest.raises(InputError, match="SGLang pads what its 1 ranks share"):
        check_widths(served, model.config, tp=1)


SERVED = {
    **{name: allowed[0] for _, names, allowed in AS_MEASURED for name in names},
    "tp_size": 2,
    "kv_cache_dtype": "auto",
    "revision": None,
}
"""Arguments that a plan can be run with."""


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Check a plan as SGLang's start does, with some arguments: started(plan, **arguments)."""
    folder = tiny.save(tiny.build("llama", layers=2), tmp_path / "model")

    def start(plan: Path | None = None, *, version: str = configure.VERSION, architecture="LlamaForCausalLM", **given):
        plan = plan or write_plan(tmp_path / "plan.json", folder, 2, [D, K])
        config = SimpleNamespace(architectures=[architecture], num_hidden_layers=given.pop("blocks", 2))
        overrides = SimpleNamespace(
            model_config_of=lambda args: SimpleNamespace(hf_config=config, dtype=torch.bfloat16),
            resolution_result=lambda args, name: args[name],
        )
        monkeypatch.setitem(sys.modules, "sglang", SimpleNamespace(__version__=version))
        monkeypatch.setitem(sys.modules, "sglang.srt", SimpleNamespace())
        monkeypatch.setitem(sys.modules, "sglang.srt.arg_groups", SimpleNamespace())
        monkeypatch.setitem(sys.modules, "sglang.srt.arg_groups.overrides", overrides)
        monkeypatch.setenv("SPD_PLAN", str(plan))
        configure.configured({**SERVED, "model_path": str(folder), **given})

    start.folder = folder
    return start


REFUSED = {
    "another release": ({"version": "0.5.24"}, "can be run by SGLang 0.5.23"),
    "another size": ({"tp_size": 4}, "is for TP 2, but SGLang was started with TP 4; set --tp-size 2"),
    "another architecture": ({"architecture": "Gemma2ForCausalLM"}, "SGLang would run Gemma2ForCausalLM"),
    "a listed one, but not the plan's": ({"architecture": "Qwen2ForCausalLM"}, "is for LlamaForCausalLM with 2 blocks"),
    "fewer blocks": ({"blocks": 1}, "is LlamaForCausalLM with 1"),
    "another dtype": ({"kv_cache_dtype": "fp8_e5m2"}, r"a KV cache in another dtype \(--kv-cache-dtype fp8_e5m2\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_run_is_refused_before_the_start(name, started):
    given, words = REFUSED[name]
    with pytest.raises(InputError, match=words) as e:
        started(**given)
    assert str(e.value).endswith(".") and "\n" not in str(e.value)


def test_what_can_be_run_is_not_refused(started, tmp_path):
    started()
    started(kv_cache_dtype="bfloat16", load_format="safetensors")
    started(write_plan(tmp_path / "full.json", started.folder, 2, [D, D], [D, K], ["full", None]))


def test_plans_that_ask_for_more_are_refused(started, tmp_path):
    plan = write_plan(tmp_path / "bits.json", started.folder, 2, [K, K], bits={(0, "mlp"): 8})
    with pytest.raises(InputError, match="requires 'quantised_sync', which the SGLang runtime does not have"):
        started(plan)
    plan = write_plan(tmp_path / "by_phase.json", started.folder, 2, [K, K], prefill={0: {"strategy": D}})
    with pytest.raises(InputError, match=r"requires 'two_phases', .*: one forward of SGLang may hold chunks"):
        started(plan)
    other = tiny.save(tiny.build("llama", layers=2, seed=1), tmp_path / "other")
    with pytest.raises(InputError, match="made for other weights"):
        started(model_path=str(other))
    with pytest.raises(InputError, match=r"nowhere\.json"):
        started(tmp_path / "nowhere.json")


def test_every_argument_that_changes_what_is_computed_is_refused():
    for what, names, allowed in AS_MEASURED:
        for name in names:
            for value in allowed:
                assert not_as_measured({**SERVED, name: value}.get, dtype="bfloat16") is None
            other = next(value for value in ("mistral", True, 2) if value not in allowed)
            said = not_as_measured({**SERVED, name: other}.get, dtype="bfloat16")
            assert said == f"{what} (--{name.replace('_', '-')} {other})"


@pytest.fixture
def hook_registry(monkeypatch):
    """What is hooked, (target, hook), in a process whose SGLang has every target."""
    registered = []
    registry = SimpleNamespace(
        HookRegistry=SimpleNamespace(register=lambda target, hook, kind: registered.append((target, hook))),
        HookType=SimpleNamespace(AROUND="around"),
    )
    monkeypatch.setitem(sys.modules, "sglang.srt.plugins.hook_registry", registry)
    for name in ("sglang", "sglang.srt", "sglang.srt.plugins"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(__path__=[]))
    return registered


def test_without_a_plan_nothing_is_hooked(hook_registry, monkeypatch):
    monkeypatch.delenv("SPD_PLAN", raising=False)
    plugin.register()
    assert hook_registry == []
    # a process that hooked SGLang for a plan, and starts it again without one
    loaded = []
    hooks = {target.rsplit(".", 1)[-1]: hook for target, hook in plugin.hooks().items()}
    hooks["check_server_args"](loaded.append, "arguments")
    hooks["load_model"](loaded.append, "runner")
    assert loaded == ["arguments", "runner"]


def test_a_hook_without_a_place_ends_the_process(hook_registry, monkeypatch):
    """SGLang goes on where a plugin raises an error, and would serve the dense model; this it cannot go on from."""
    monkeypatch.setenv("SPD_PLAN", "plan.json")
    with pytest.raises(SystemExit, match="SPD_PLAN names a plan, and spd-calib cannot run it in this SGLang: "):
        plugin.register()


def test_other_weights_are_refused():
    hooks = {target.rsplit(".", 1)[-1]: hook for target, hook in plugin.hooks().items()}
    never = lambda *_: pytest.fail("the weights were updated")  # noqa: E731
    for name in ("update_weights_from_disk", "update_weights_from_tensor", "load_weights_from_distributed"):
        done, message = hooks[name](never, "updater", "weights", load_format="auto")
        assert not done and "made for the weights loaded at the start" in message


def test_check_does_not_vouch_for_it():
    with pytest.raises(InputError, match="SGLang runs plans by its plugin, and nothing checks yet that it does"):
        check(Path("plan.json"), runtime="sglang")


INSTALLED = importlib.util.find_spec("sglang")
SOURCE = os.environ.get("SGLANG_SOURCE") or (INSTALLED and str(Path(INSTALLED.origin).parent))
"""The folder of the package `sglang`: what SGLANG_SOURCE names, such as an unpacked wheel, or the one installed."""


def syntax(module: str) -> ast.Module:
    path = Path(SOURCE, *module.split(".")[1:])
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def method(module: str, of: str, name: str) -> ast.FunctionDef:
    (owner,) = (n for n in syntax(module).body if isinstance(n, ast.ClassDef) and n.name == of)
    return next(n for n in owner.body if isinstance(n, ast.FunctionDef) and n.name == name)


def parameters(function: ast.FunctionDef) -> list[str]:
    given = function.args
    stars = [arg.arg for arg in (given.vararg, given.kwarg) if arg]
    return [arg.arg for arg in (*given.posonlyargs, *given.args, *given.kwonlyargs)] + stars


STUBS = [
    ("sglang.srt.layers.linear", "RowParallelLinear", "forward", sglang_stub.RowParallelLinear),
    ("sglang.srt.layers.quantization.unquant", "UnquantizedLinearMethod", "apply", sglang_stub.UnquantizedLinearMethod),
    ("sglang.srt.layers.layernorm", "RMSNorm", "forward_cuda", sglang_stub.RMSNorm),
    ("sglang.srt.layers.layer_boundary.stage", "StageBoundary", "prepare", sglang_stub.StageBoundary),
    ("sglang.srt.layers.layer_boundary.stage", "StageBoundary", "finish", sglang_stub.StageBoundary),
    ("sglang.srt.layers.layer_boundary.residual.stream", "ResidualStream", "write", sglang_stub.ResidualStream),
    ("sglang.srt.layers.layer_boundary.residual.stream", "ResidualStream", "record", sglang_stub.ResidualStream),
]
"""(module, class, method) of SGLang's, and the stub's class."""

ORDER = [
    "attn_boundary.prepare",
    "self_attn",
    "attn_boundary.finish",
    "ffn_boundary.prepare",
    "mlp",
    "ffn_boundary.finish",
]
"""What a layer calls, in order."""


ON_NPUS = ("wait_cmo_stream", "get_cmo_stream", "check_cuda_graph_backend", "hasattr")
"""What Qwen 3's layer calls besides, on another kind of device."""


@pytest.mark.skipif(not SOURCE, reason="SGLang's source is not here; SGLANG_SOURCE names the folder of its package")
def test_the_stub_and_the_plugin_are_as_the_source_says():
    version = next(Path(SOURCE).parent.glob("sglang-*.dist-info")).name
    assert version == f"sglang-{configure.VERSION}.dist-info"
    for module, of, name, stub in STUBS:
        own = getattr(stub, "forward" if name == "forward_cuda" else name)
        assert parameters(method(module, of, name)) == list(inspect.signature(own).parameters), (of, name)
    keep = Planned(Drop(Strategy.KEEP_SYNC), Drop(Strategy.KEEP_SYNC))
    ours = list(inspect.signature(planned_forward(MagicMock(), keep, rank=0)).parameters)
    for model, layer in FORMS.values():
        module, of = f"sglang.srt.models.{layer.split('.')[0]}", layer.split(".")[1]
        method(module, model.split(".")[1], "forward")
        forward = method(module, of, "forward")
        assert parameters(forward)[:4] == ["self", *ours[:3]] and {*parameters(forward)[4:]} <= {*ours[3:]}
        calls = [node for node in ast.walk(forward) if isinstance(node, ast.Call)]
        calls.sort(key=lambda call: (call.end_lineno, call.end_col_offset))
        called = [ast.unparse(call.func).removeprefix("self.") for call in calls]
        assert [name for name in called if name in ORDER] == ORDER and set(called) <= {*ORDER, *ON_NPUS}
    for target in plugin.hooks():
        method(*target.rsplit(".", 2))
    fields = Path(SOURCE, "srt", "arg_groups", "fields")
    known = {
        node.target.id
        for file in fields.glob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.AnnAssign)
    }
    assert set(SERVED) <= known
