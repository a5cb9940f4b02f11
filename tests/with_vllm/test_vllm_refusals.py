"""Where an engine is configured: no plan, no effect; a plan that cannot be run is refused with the reason."""

import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from plans import write_plan
from quantised_copies import quantise, scheme_of

from spd_calib.errors import InputError
from spd_calib.formats.drops import NOTHING_DROPPED, Drop, Drops, Strategy
from spd_calib.models.predictor import Predictor
from spd_calib.runtimes.engine_layers import fitted
from spd_calib.runtimes.vllm import cpu_kernels
from spd_calib.runtimes.vllm.configure import not_as_measured
from spd_calib.runtimes.vllm.layers import apply
from spd_calib.runtimes.vllm.mixtures import check_mixture
from spd_calib.runtimes.vllm.worker import _apply

K, D = "keep_sync", "block_drop"
CPU_WORKER = "vllm.v1.worker.cpu_worker.CPUWorker"


@pytest.fixture
def folder(folder_of):
    return folder_of("llama")


@pytest.fixture
def plan(folder, tmp_path):
    return write_plan(tmp_path / "plan.json", folder, 2, [D, K, K, D])


def configured(folder, plan=None, tp=2, **options):
    """The configuration that an engine would start with."""
    from vllm.engine.arg_utils import EngineArgs

    if plan is not None:
        options["additional_config"] = {"spd_plan": str(plan)}
    options = {"max_model_len": 64, "dtype": "float32", "enforce_eager": True, **options}
    return EngineArgs(model=str(folder), tensor_parallel_size=tp, **options).create_engine_config()


def edited(path, **changes):
    """The file at `path` with fields replaced, whether or not it is valid then."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return path


def refused(folder, plan, words, **options):
    """The engine's configuration is refused in one sentence that holds `words`."""
    with pytest.raises(InputError) as e:
        configured(folder, plan, **options)
    sentence = str(e.value)
    assert words in sentence and "\n" not in sentence and sentence.endswith("."), sentence


def test_no_plan_no_effect(folder):
    config = configured(folder)
    assert config.additional_config == {} and config.parallel_config.worker_cls == CPU_WORKER


def test_a_plan_reaches_the_workers(folder, plan):
    config = configured(folder, plan)
    assert config.parallel_config.worker_cls == "spd_calib.runtimes.vllm.cpu_worker.PlannedCPUWorker"
    assert config.additional_config["spd_plan"] == str(plan)
    resolved = config.additional_config["spd_calib"]
    assert resolved["blocks"] == 4 and resolved["drops"] == [
        {"block": 0, "sync_point": "attention", "strategy": D},
        {"block": 3, "sync_point": "attention", "strategy": D},
    ]


def test_a_compensation_is_checked_before_anything_starts(folder, tmp_path):
    plan = write_plan(tmp_path / "plan.json", folder, 2, [D, K, K, D], kinds=["mean", None, None, "full"])
    resolved = configured(folder, plan).additional_config["spd_calib"]
    beside = tmp_path / "compensation.safetensors"
    assert resolved["compensation"] == hashlib.sha256(beside.read_bytes()).hexdigest()
    beside.write_bytes(beside.read_bytes()[:-1] + b"x")
    refused(folder, plan, "is not the file")
    beside.unlink()
    refused(folder, plan, "copy both files together")


def test_the_environment_is_the_fallback(folder, plan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPD_PLAN", "plan.json")
    assert configured(folder).additional_config["spd_plan"] == str(plan)
    other = write_plan(tmp_path / "other.json", folder, 2, [K] * 4)
    assert configured(folder, other).additional_config["spd_plan"] == str(other)


def test_serving_takes_the_same_way(folder, plan):
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    line = ["--model", str(folder), "--tensor-parallel-size", "2", "--additional-config"]
    args = parser.parse_args([*line, json.dumps({"spd_plan": str(plan)})])
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    assert [row["block"] for row in config.additional_config["spd_calib"]["drops"]] == [0, 3]


def test_two_plans_are_two_keys_of_the_compile_cache(folder, plan):
    """Also where the second lies in the same place as the first did."""
    hashes = {configured(folder).compute_hash(), configured(folder, plan).compute_hash()}
    write_plan(plan, folder, 2, [K, D, K, D])
    assert len(hashes | {configured(folder, plan).compute_hash()}) == 3


def test_another_tp_size(folder, plan):
    refused(folder, plan, "is for TP 2, but vLLM was started with TP 4", tp=4)


def test_an_unknown_requirement(folder, plan, tmp_path):
    refused(folder, edited(plan, requires=["telepathy"]), "requires")
    replicated = write_plan(tmp_path / "replicated.json", folder, 2, [D, K, K, D], replicated={0: ((1,), (0,))})
    refused(folder, replicated, "'replicated_heads', which the vLLM runtime does not have: vLLM cuts q, k and v")
    by_phase = write_plan(tmp_path / "by_phase.json", folder, 2, [D, K, K, D], prefill={0: {"strategy": K}})
    refused(folder, by_phase, "'two_phases', which the vLLM runtime does not have: one forward of vLLM holds chunks")


def test_stale_weights(folder, plan):
    model = {**json.loads(plan.read_text())["model"], "weight_fingerprint": "0" * 64}
    refused(folder, edited(plan, model=model), "other weights")


def test_another_model(folder_of, plan):
    refused(folder_of("qwen2"), plan, "is for LlamaForCausalLM with 4 blocks")


def test_an_architecture_that_is_not_on_the_list(plan, tmp_path):
    folder = tiny.save(tiny.build("apertus"), tmp_path / "apertus")
    refused(folder, plan, "ApertusForCausalLM, whose decoder layer spd-calib does not know")


def test_the_generic_implementation_of_a_known_architecture(folder, plan):
    refused(folder, plan, "whose decoder layer spd-calib does not know", model_impl="transformers")


@pytest.mark.parametrize(
    ("family", "words"), [("llama", "width 8, only of 32"), ("deepseek_v3", "width 24, only of 576")]
)
def test_heads_that_no_kernel_on_a_cpu_runs(tmp_path, family, words):
    """Of latent attention what counts is the width of a latent and of the rotary part beside it."""
    folder = tiny.save(tiny.build(family), tmp_path / "narrow")
    plan = write_plan(tmp_path / "plan.json", folder, 2, [D, K, K, K])
    refused(folder, plan, f"no kernel for heads of {words}")


OVERFLOWS = """
from types import SimpleNamespace
from vllm.platforms import current_platform
from spd_calib.runtimes.vllm.cpu_kernels import check_products
from spd_calib.errors import InputError

current_platform.import_kernels()
weights = {"num_bits": 8, "type": "int", "strategy": "channel"}
group = {"targets": ["Linear"], "weights": weights, "input_activations": {"num_bits": 8, "type": "int"}}
said = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"group_0": group}}
model = SimpleNamespace(hf_config=SimpleNamespace(quantization_config=said, to_dict=lambda: {}))
try:
    check_products(SimpleNamespace(model_config=model))
except InputError as e:
    print(e)
"""


def test_products_of_whole_numbers_that_overflow_on_this_cpu_are_refused():
    """As oneDNN's do on a processor without VNNI: here one that is told not to use it."""
    told = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    found = subprocess.run([sys.executable, "-c", OVERFLOWS], env=told, capture_output=True, text=True, timeout=300)
    assert found.stdout.strip().endswith("overflow; run the plan on a GPU, or on another CPU."), found.stderr[-2000:]


def test_whole_numbers_of_4_bits_need_a_kernel_that_not_every_cpu_has(folder, tmp_path, monkeypatch):
    copy = Path(shutil.copytree(folder, tmp_path / "gptq"))
    quantise(copy, "gptq", group=8)
    plan = write_plan(tmp_path / "plan.json", copy, 2, [D, K, K, D])
    monkeypatch.setattr(torch.ops, "_C", SimpleNamespace())
    refused(copy, plan, "no kernel on this CPU for weights in 4-bit whole numbers (gptq)", dtype="bfloat16")


def test_a_dtype_that_no_kernel_for_linear_attention_on_a_cpu_knows(folder_of, tmp_path):
    folder = folder_of("qwen3_next")
    plan = write_plan(tmp_path / "plan.json", folder, 2, [D, K, K, D])
    refused(folder, plan, "a kernel for bfloat16 alone, not for float32")
    assert configured(folder, plan, dtype="bfloat16").additional_config["spd_calib"]["drops"]


def test_pipeline_parallelism(folder, plan):
    refused(folder, plan, "pipeline parallelism", pipeline_parallel_size=2)


def test_lora(folder, plan):
    refused(folder, plan, "LoRA", enable_lora=True)


def test_another_worker(folder, plan):
    refused(folder, plan, "worker", worker_cls="vllm.v1.worker.xpu_worker.XPUWorker")


def test_a_worker_that_was_named_wants_a_plan(folder, plan):
    named = {"worker_cls": "spd_calib.runtimes.vllm.cpu_worker.PlannedCPUWorker"}
    assert configured(folder, plan, **named).parallel_config.worker_cls == named["worker_cls"]
    with pytest.raises(InputError, match="which runs plans, and there is none"):
        configured(folder, **named)


def test_a_worker_without_the_plugin_says_so():
    worker = SimpleNamespace(vllm_config=SimpleNamespace(additional_config={}))
    with pytest.raises(InputError, match="VLLM_PLUGINS must not leave it out"):
        _apply(worker)


@pytest.mark.parametrize(
    ("method", "args"),
    [
        ("reload_weights", ()),
        ("reset_weights", ()),
        ("start_weight_update", ()),
        ("start_draft_weight_update", ()),
        ("sleep", (2,)),
        ("discard", (("weights",),)),
    ],
)
def test_a_worker_takes_no_other_weights(method, args):
    """vLLM has every one of these, under this name."""
    from spd_calib.runtimes.vllm.gpu_worker import PlannedGPUWorker, Worker

    worker = PlannedGPUWorker.__new__(PlannedGPUWorker)
    assert callable(getattr(Worker, method))
    with pytest.raises(InputError, match="the plan was made for those loaded at the start"):
        getattr(worker, method)(*args)


def test_a_worker_may_sleep_with_its_weights(monkeypatch):
    from spd_calib.runtimes.vllm.gpu_worker import PlannedGPUWorker, Worker

    slept = []
    monkeypatch.setattr(Worker, "sleep", lambda self, level: slept.append(level))
    PlannedGPUWorker.__new__(PlannedGPUWorker).sleep()
    assert slept == [1]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "There is no file"),
        ('{"format": "spd-calib/plan"', "not valid JSON"),
        ('{"format": "spd-calib/profile", "version": 1}', "not a plan file"),
        ('{"format": "spd-calib/plan", "version": 2}', "version 2"),
        ('{"format": "spd-calib/plan", "version": 1}', "not a valid plan"),
    ],
)
def test_a_file_that_is_no_plan(folder, tmp_path, content, words):
    path = tmp_path / "broken.json"
    if content is not None:
        path.write_text(content)
    refused(folder, path, words)


def test_a_plan_that_is_not_named(folder):
    with pytest.raises(InputError, match="name the plan's file"):
        configured(folder, additional_config={"spd_plan": 3})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cpu_offload_gb": 1}, "weights offloaded to the CPU"),
        ({"offload_group_size": 2}, "weights offloaded to the CPU"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "a KV cache in fp8_e5m2"),
        ({"kv_cache_dtype": "bfloat16"}, "a KV cache in bfloat16"),  # the model is in float32
        ({"kv_sharing_fast_prefill": True}, "--kv-sharing-fast-prefill"),
        ({"data_parallel_size": 2}, "data parallelism"),
        ({"speculative_config": {"method": "eagle", "model": "", "num_speculative_tokens": 2}}, "reads hidden states"),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "kept or filled elsewhere",
        ),
        ({"kv_offloading_size": 1.0}, "kept or filled elsewhere"),
        ({"weight_transfer_config": {"backend": "nccl"}}, "weights transferred"),
        ({"load_format": "dummy"}, "--load-format dummy"),
        ({"hf_overrides": {"rope_theta": 500.0}}, "--hf-overrides"),
        ({"runner": "pooling"}, "the runner 'pooling'"),
    ],
)
def test_an_engine_that_would_compute_something_else(folder, plan, options, words):
    if "speculative_config" in options:
        options = {"speculative_config": {**options["speculative_config"], "model": str(folder)}}
    configured(folder, **options)  # without a plan it may
    refused(folder, plan, words, **options)


def test_experts_that_no_router_has_chosen(folder, plan, monkeypatch):
    monkeypatch.setenv("VLLM_MOE_ROUTING_SIMULATION_STRATEGY", "uniform_random")
    refused(folder, plan, "experts chosen at random")


def test_a_kv_cache_in_the_dtype_of_the_model(folder, plan):
    configured(folder, plan, dtype="bfloat16", kv_cache_dtype="bfloat16")


def test_a_checkpoint_that_asks_for_a_quantised_kv_cache(folder, tmp_path, monkeypatch):
    """Also where --kv-cache-dtype names another, or is the default; and vLLM itself would take it."""
    monkeypatch.setattr(cpu_kernels, "multiplies_exactly", lambda: True)  # nothing runs here, so on any CPU
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    quantise(copy, "compressed int8")
    plan = write_plan(tmp_path / "plan.json", copy, 2, [D, K, K, D])
    assert configured(copy, plan, dtype="bfloat16").additional_config["spd_calib"]["drops"]
    config = json.loads((copy / "config.json").read_text())
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    config["quantization_config"]["kv_cache_scheme"] = scheme
    (copy / "config.json").write_text(json.dumps(config))
    configured(copy, dtype="bfloat16")
    for named in ("auto", "bfloat16", "fp8_e5m2"):
        refused(copy, plan, "a quantised KV cache", dtype="bfloat16", kv_cache_dtype=named)


def test_weights_that_vllm_would_quantise(folder, plan):
    refused(folder, plan, "weights quantised as they are loaded (fp8)", dtype="bfloat16", quantization="fp8")


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_quantised_experts(folder_of, tmp_path, family):
    copy = Path(shutil.copytree(folder_of(family), tmp_path / "copy"))
    plan = write_plan(tmp_path / "plan.json", copy, 2, [D, K, K, D])
    config = json.loads((copy / "config.json").read_text())
    said, _ = scheme_of("compressed int8", group=32, block=128)
    said = {"quant_method": "mxfp4"} if family == "gpt_oss" else said
    (copy / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    refused(copy, plan, "quantised experts", dtype="bfloat16")


def test_what_needs_more_than_a_cpu_to_configure(folder):
    config = configured(folder)
    fields = ("parallel_config", "model_config", "cache_config", "offload_config", "lora_config", "speculative_config")
    fields += ("load_config", "kv_transfer_config", "weight_transfer_config")
    likeness = {name: getattr(config, name) for name in fields}
    assert not_as_measured(SimpleNamespace(**likeness, quant_config=None)) is None
    narrow = {**vars(config.cache_config), "mamba_ssm_cache_dtype": "float16"}  # a CPU's is always float32
    of_state = {**likeness, "cache_config": SimpleNamespace(**narrow)}
    assert "linear attention in float16" in not_as_measured(SimpleNamespace(**of_state, quant_config=None))
    asks = SimpleNamespace(kv_cache_scheme={"num_bits": 8, "type": "float"})
    assert "which the checkpoint asks for" in not_as_measured(SimpleNamespace(**likeness, quant_config=asks))


def test_a_class_of_the_same_name_is_not_enough():
    class LlamaForCausalLM(torch.nn.Module):
        pass

    with pytest.raises(InputError, match="its layers are not known"):
        apply(LlamaForCausalLM(), NOTHING_DROPPED)


def unbuilt(kind, **parts):
    """An object of one of vLLM's own modules with these parts, made without a process group and without weights."""
    module = kind.__new__(kind)
    torch.nn.Module.__init__(module)
    for name, part in parts.items():
        setattr(module, name, part)
    return module


def unbuilt_llama(blocks: int):
    """vLLM's own Llama of so many layers, with no more in it than `apply` looks at; and its layers."""
    from vllm.model_executor.layers.linear import RowParallelLinear
    from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM

    def linear():
        return unbuilt(RowParallelLinear, input_is_parallel=True, return_bias=True, quant_method=None, tp_rank=0)

    plain = torch.nn.Identity
    layers = torch.nn.ModuleList(
        unbuilt(
            LlamaDecoderLayer,
            self_attn=unbuilt(plain, o_proj=linear()),
            mlp=unbuilt(plain, down_proj=linear()),
            input_layernorm=plain(),
            post_attention_layernorm=plain(),
        )
        for _ in range(blocks)
    )
    return unbuilt(LlamaForCausalLM, model=unbuilt(plain, layers=layers)), layers


@pytest.mark.parametrize(
    ("place", "config", "words"),
    [
        ("ernie45.Ernie4_5ForCausalLM", {"use_bias": True}, "use_bias = True"),
        ("gpt_oss.GptOssForCausalLM", {"swiglu_limit": 0.5}, "swiglu_limit = 0.5"),
        (
            "gpt_oss.GptOssForCausalLM",
            {"num_hidden_layers": 2, "layer_types": 2 * ["full_attention"]},
            "layer_types = ['full_attention', 'full_attention']",
        ),
        ("deepseek_v2.DeepseekV2ForCausalLM", {"n_group": 4, "topk_method": "greedy"}, "topk_method = greedy"),
        ("deepseek_v2.DeepseekV3ForCausalLM", {"attention_bias": True}, "attention_bias = True"),
    ],
)
def test_what_a_configuration_asks_for_that_vllm_would_leave_out(place, config, words):
    module, name = place.split(".")
    kind = getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), name)
    with pytest.raises(InputError) as e:
        apply(unbuilt(kind, config=SimpleNamespace(**config)), NOTHING_DROPPED)
    assert f"leave out what its configuration asks for by {words}: no plan." in str(e.value)


def test_a_layer_whose_input_is_gathered_is_refused():
    """As transformers' GLM is cut in vLLM: each rank's neurons would be of another rank's stream."""
    model, layers = unbuilt_llama(2)
    layers[1].mlp.down_proj.input_is_parallel = False
    with pytest.raises(InputError, match=r"gathers what the layer's mlp.down_proj reads"):
        apply(model, Drops.of_blocks([D, K]))


def test_inputs_that_vllm_would_round_unasked_are_refused():
    """As its kernel of 4-bit weights does on a CPU with AMX, where only the weights were measured rounded."""
    model, layers = unbuilt_llama(2)
    layers[1].mlp.down_proj.use_w4a8 = True
    with pytest.raises(InputError, match=r"mlp.down_proj reads to 8 bits.*VLLM_CPU_INT4_W4A8=0\.$"):
        apply(model, Drops.of_blocks([D, K]))


def test_what_apply_set_it_takes_back():
    model, layers = unbuilt_llama(3)
    for drops, planned in (
        (Drops.of_blocks([D, K, D]), [0, 2]),
        (Drops.of_blocks([K, D, K]), [1]),
        (NOTHING_DROPPED, []),
    ):
        apply(model, drops)
        assert [i for i, layer in enumerate(layers) if "forward" in vars(layer)] == planned
        assert [i for i, layer in enumerate(layers) if "forward" in vars(layer.mlp.down_proj)] == planned


@pytest.mark.parametrize("wrapped", ["layer", "o_proj", "down_proj"])
def test_a_forward_that_somebody_else_wrapped_is_not_thrown_away(wrapped):
    """As vLLM's weight offloading does, which would then read weights that are not there."""
    model, layers = unbuilt_llama(3)
    module = {"layer": layers[2], "o_proj": layers[2].self_attn.o_proj, "down_proj": layers[2].mlp.down_proj}[wrapped]
    own = module.forward = lambda *args, **kwargs: None
    for drops in (Drops.of_blocks([D, K, K]), Drops.of_blocks([K, K, D]), NOTHING_DROPPED):
        with pytest.raises(InputError, match="has wrapped the forward of block 2's") as e:
            apply(model, drops)
        assert str(e.value).endswith(".") and "\n" not in str(e.value)
        assert module.forward is own
        assert all("forward" not in vars(layer) for layer in layers[:2]), "refused before anything was changed"


def test_sync_points_that_the_model_does_not_have():
    with pytest.raises(InputError, match="block 3 is no sync point that can be dropped in a model of 3 blocks"):
        apply(unbuilt_llama(3)[0], Drops.of_blocks([K, K, K, D]))


def test_a_predictor_goes_to_the_dtype_that_a_packed_layer_computes_in():
    o_proj = unbuilt(torch.nn.Identity, input_size_per_partition=3, output_size=4, params_dtype=torch.bfloat16)
    o_proj.qweight = torch.nn.Parameter(torch.zeros(3, 1, dtype=torch.int32), requires_grad=False)
    given = Predictor(torch.full((4,), 0.5), w=torch.full((3, 4), 0.25))
    found = fitted(o_proj, Drop(Strategy.BLOCK_DROP, {1: given}), block=0, d_rank=3, rank=1)
    assert found.bias.dtype == found.w.dtype == torch.bfloat16
    assert found.w.tolist() == given.w.tolist()
    with pytest.raises(InputError, match="no predictor for rank 1"):
        fitted(o_proj, Drop(Strategy.BLOCK_DROP, {0: given}), block=0, d_rank=3, rank=1)


def test_registering_twice_is_registering_once():
    from vllm.engine.arg_utils import EngineArgs

    from spd_calib.runtimes.vllm.plugin import register

    register()
    once = EngineArgs.create_engine_config
    register()
    assert EngineArgs.create_engine_config is once


def test_nothing_in_the_environment_names_a_plan():
    assert "SPD_PLAN" not in os.environ


def unbuilt_mixtral(blocks: int):
    """As unbuilt_llama, with a mixture of experts in each layer; and its layers."""
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
    from vllm.model_executor.models.mixtral import MixtralDecoderLayer, MixtralForCausalLM

    llama, layers = unbuilt_llama(blocks)
    plain = torch.nn.Identity
    for i, layer in enumerate(layers):
        experts = unbuilt(
            MoERunner,
            gate=plain() if i else None,  # some call the router themselves
            moe_config=SimpleNamespace(
                moe_parallel_config=SimpleNamespace(use_ep=False),
                is_sequence_parallel=False,
                skip_final_all_reduce=False,
                in_dtype=torch.float16,
            ),
            router=router(),
            routed_scaling_factor=1.0,
            routed_experts=SimpleNamespace(quant_method=SimpleNamespace(moe_kernel=None)),
            routed_output_transform=None,
        )
        parts = {name: module for name, module in layer.named_children() if name != "mlp"}
        layers[i] = unbuilt(
            MixtralDecoderLayer, **parts, block_sparse_moe=unbuilt(plain, gate=plain(), experts=experts)
        )
    return unbuilt(MixtralForCausalLM, model=llama.model), layers


def test_experts_end_before_their_sum_where_something_is_dropped():
    model, layers = unbuilt_mixtral(3)
    runners = [layer.block_sparse_moe.experts for layer in layers]
    routers = [runner.gate for runner in runners]
    for drops, planned in ((Drops.of_blocks([D, D, K]), [0, 1]), (NOTHING_DROPPED, [])):
        apply(model, drops)
        assert [i for i, layer in enumerate(layers) if "forward" in vars(layer)] == planned
        assert [i for i, runner in enumerate(runners) if runner.moe_config.skip_final_all_reduce] == planned
        assert [runner.gate for runner in runners] == [None if i in planned else g for i, g in enumerate(routers)]


def router(correction=None):
    """vLLM's own router on a CPU of three experts, of which it chooses one."""
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    return CPURouter(top_k=1, global_num_experts=3, e_score_correction_bias=correction)


def test_a_router_on_a_cpu_leaves_the_correction_of_scores_out():
    """Which is why such models are refused there; once vLLM reads it, they need not be."""
    logits, correction = torch.tensor([[0.1, 0.0, 0.2]]), torch.tensor([0.0, 1.0, 0.0])
    assert router(correction)._compute_routing(logits, logits, None)[1].item() == 2


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("expert parallel", lambda runner: setattr(runner.moe_config.moe_parallel_config, "use_ep", True)),
        ("sequence parallel", lambda runner: setattr(runner.moe_config, "is_sequence_parallel", True)),
        ("is transformed", lambda runner: setattr(runner, "routed_output_transform", torch.nn.Identity())),
        (
            "sums over the ranks itself",
            lambda runner: setattr(
                runner.routed_experts.quant_method, "moe_kernel", SimpleNamespace(output_is_reduced=lambda: True)
            ),
        ),
        ("leaves the correction bias", lambda runner: setattr(runner, "router", router(torch.ones(3)))),
        ("in float16", lambda runner: setattr(runner, "routed_scaling_factor", 1.5)),
        ("does not know", lambda runner: setattr(runner, "__class__", type("Other", (type(runner),), {}))),
    ],
)
def test_experts_whose_sum_cannot_wait_are_refused(words, change):
    model, layers = unbuilt_mixtral(2)
    change(layers[1].block_sparse_moe.experts)
    with pytest.raises(InputError, match=words) as e:
        apply(model, Drops.of_blocks([D, K]))
    assert "block 1" in str(e.value) and all("forward" not in vars(layer) for layer in layers)


def test_a_router_that_scores_otherwise_than_the_model_is_refused():
    """As DeepSeek V3's in vLLM, where the checkpoint's configuration does not say `scoring_func`."""
    _, layers = unbuilt_mixtral(1)
    mixture = layers[0].block_sparse_moe
    check_mixture(mixture, block=0, routers=(("scoring_func", "softmax"),))
    with pytest.raises(InputError, match="the router's scoring_func is softmax"):
        check_mixture(mixture, block=0, routers=(("scoring_func", "sigmoid"),))


@pytest.mark.parametrize("how", ["replicate_shared_expert", "is_fused_shared_expert_enabled"])
def test_a_shared_expert_that_is_not_cut_over_the_ranks_is_refused(how):
    model, layers = unbuilt_mixtral(2)
    setattr(layers[1].block_sparse_moe, how, True)
    with pytest.raises(InputError, match="The experts' sum of block 1 cannot wait in vLLM: its shared expert"):
        apply(model, Drops.of_blocks([D, K]))


def test_a_mixture_takes_no_plain_drop():
    with pytest.raises(InputError, match="choose different experts"):
        apply(unbuilt_mixtral(2)[0], Drops.of_blocks(["plain_drop", K]))


def test_whole_experts_on_ranks_are_refused_before_anything_starts(folder_of, tmp_path):
    folder = folder_of("mixtral")
    plan = write_plan(tmp_path / "plan.json", folder, 2, [D, K, K, K])
    configured(folder, plan)
    refused(folder, plan, "expert parallel", enable_expert_parallel=True)
