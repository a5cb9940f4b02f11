"""From an engine configuration with a plan to one whose workers run it, or one sentence why they cannot.

Runs once, where the engine is configured: the workers get the drops themselves, and read nothing but their rank's
predictors, from the file whose hash they got. All of it stands in `additional_config`, which vLLM's compile cache has
in its key, so that code compiled for one plan never serves another.
"""

import os
from pathlib import Path
from typing import Any

from spd_calib.errors import InputError
from spd_calib.formats.files import read, sha256_of
from spd_calib.formats.plan import Plan
from spd_calib.models.plan_files import load_drops
from spd_calib.runtimes.plan_checks import (
    ENVIRONMENT,
    check_requires,
    check_same_model,
    check_tp,
    named_in_environment,
)

from .cpu_kernels import check_attention, check_products
from .forms import SUPPORTED as ARCHITECTURES
from .forms import is_supported
from .rows import to_rows

PLAN, RESOLVED = "spd_plan", "spd_calib"
WORKERS = {
    "vllm.v1.worker.gpu_worker.Worker": "spd_calib.runtimes.vllm.gpu_worker.PlannedGPUWorker",
    "vllm.v1.worker.cpu_worker.CPUWorker": "spd_calib.runtimes.vllm.cpu_worker.PlannedCPUWorker",
}
"""vLLM's worker classes -> those that apply a plan once the model is loaded."""

SUPPORTED = {"mlp_drop", "compensation", "router_predictor"}
"""The requirements of a plan that this runtime meets."""

LACKING = {
    "quantised_sync": "its all-reduce inside a layer takes no bits",
    "replicated_heads": "vLLM cuts q, k and v of all layers alike, and its KV cache holds as many heads of each",
    "two_phases": "one forward of vLLM holds chunks of prompts and single tokens of other sequences",
}
"""The requirements that it does not meet, and why."""

SPECULATION = ("ngram", "draft_model")
"""The ways of speculation that read nothing but tokens: each token is still the planned model's, which verifies it.

Others (EAGLE, MTP) read its hidden states, which lack what is owed, and after a plain drop differ from rank to rank.
"""

RANDOM_EXPERTS = "VLLM_MOE_ROUTING_SIMULATION_STRATEGY"  # in the environment: experts that no router has chosen

CHECKPOINTS = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer")
"""The values of --load-format that read the very files whose weights were fingerprinted."""


def configure(config: Any) -> None:
    """Prepare a VllmConfig for its plan; leave it alone where there is none. Raises InputError with the reason."""
    path, worker = plan_path(config), config.parallel_config.worker_cls
    if path is None:
        if worker in WORKERS.values():
            raise InputError(
                f"--worker-cls names {worker}, which runs plans, and there is none: name it in --additional-config "
                f"'{{\"{PLAN}\": ...}}' or in {ENVIRONMENT}, on every node."
            )
        return
    plan = read(Plan, path)
    check(plan, path, config=config)
    drops = load_drops(plan, path, ranks=())  # no predictor yet, but their file must be there, whole, and the plan's
    config.additional_config = {
        **config.additional_config,
        PLAN: str(path),
        RESOLVED: {
            "sha256": sha256_of(path),
            "blocks": plan.model.num_blocks,
            "drops": to_rows(drops),
            "compensation": plan.compensation.sha256 if plan.compensation else None,
        },
    }
    config.parallel_config.worker_cls = WORKERS.get(worker, worker)


def plan_path(config: Any) -> Path | None:
    """Return where the plan lies: `additional_config["spd_plan"]`, else the environment's SPD_PLAN, else None."""
    additional = config.additional_config
    if not isinstance(additional, dict):
        if named_in_environment():
            raise InputError(f"{ENVIRONMENT} names a plan, but additional_config is no dictionary to put it into.")
        return None
    named = additional.get(PLAN, named_in_environment())
    if named is None:
        return None
    if not isinstance(named, str) or not named:
        raise InputError(f"additional_config[{PLAN!r}] is {named!r}; name the plan's file.")
    return Path(named).expanduser().resolve()


def check(plan: Plan, path: Path, *, config: Any) -> None:
    """Check all that can be known before a process is started. Raises InputError with the reason."""
    parallel, model = config.parallel_config, config.model_config
    check_requires(plan, path, engine="vLLM", supported=SUPPORTED, lacking=LACKING)
    if not is_supported(model.architecture, _architecture(model)):
        raise InputError(
            f"vLLM would run {_architecture(model)} as {model.architecture}, whose decoder layer spd-calib does not "
            f"know: {path} can be run on {', '.join(ARCHITECTURES)}."
        )
    if parallel.worker_cls not in (*WORKERS, *WORKERS.values()):
        raise InputError(f"vLLM would use the worker {parallel.worker_cls}, which spd-calib does not know: no plan.")
    check_tp(plan, path, engine="vLLM", tp=parallel.tensor_parallel_size, flag="--tensor-parallel-size")
    if config.quant_config is not None and model.is_moe:
        raise InputError(f"{path} cannot be run with quantised experts: what vLLM makes of them has not been tested.")
    if what := not_as_measured(config):
        raise InputError(f"{path} cannot be run with {what}: the vLLM runtime of spd-calib does not support it.")
    check_attention(config)
    check_products(config)
    check_same_model(
        plan,
        path,
        architecture=_architecture(model),
        blocks=model.hf_text_config.num_hidden_layers,
        model=model.model,
        revision=model.revision,
    )


def not_as_measured(config: Any) -> str | None:
    """Return what of a VllmConfig would make the engine compute something else than was measured; None for nothing."""
    parallel, model, speculative = config.parallel_config, config.model_config, config.speculative_config
    cache, load = config.cache_config.cache_dtype, config.load_config.load_format
    state, shares_keys = config.cache_config.mamba_ssm_cache_dtype, config.cache_config.kv_sharing_fast_prefill
    dtype = str(model.dtype).removeprefix("torch.")
    found = (
        ("pipeline parallelism", parallel.pipeline_parallel_size > 1),
        ("data parallelism", parallel.data_parallel_size > 1),
        ("decode context parallelism", parallel.decode_context_parallel_size > 1),
        ("prefill context parallelism", parallel.prefill_context_parallel_size > 1),
        ("whole experts on ranks (expert parallel)", parallel.enable_expert_parallel),
        (f"weights quantised as they are loaded ({model.quantization})", _quantises_itself(model)),
        ("LoRA adapters", config.lora_config is not None),
        (
            "speculation by a model that reads hidden states",
            speculative is not None and speculative.method not in SPECULATION,
        ),
        ("weights offloaded to the CPU", _offloads(config.offload_config)),
        ("a quantised KV cache, which the checkpoint asks for", _asks_for_a_quantised_cache(config)),
        (f"a KV cache in {cache}", cache not in ("auto", dtype)),
        (f"a state of linear attention in {state}", state not in ("auto", "float32", dtype)),
        ("keys and values that the last layers share (--kv-sharing-fast-prefill)", shares_keys),
        ("a KV cache that is kept or filled elsewhere", config.kv_transfer_config is not None),
        ("weights transferred into the engine", config.weight_transfer_config is not None),
        (f"weights by --load-format {load}", load not in CHECKPOINTS),
        ("a configuration changed by --hf-overrides", bool(model.hf_overrides)),
        (f"the runner {model.runner_type!r}", model.runner_type != "generate"),
        (f"experts chosen at random ({RANDOM_EXPERTS})", bool(os.environ.get(RANDOM_EXPERTS))),
    )
    return next((what for what, used in found if used), None)


def _quantises_itself(model: Any) -> bool:
    """Say whether vLLM would quantise weights, or what layers read, in another way than the checkpoint says."""
    stored = getattr(model.hf_config, "quantization_config", None) is not None
    return model.quantization_config is not None or (model.quantization is not None and not stored)


def _asks_for_a_quantised_cache(config: Any) -> bool:
    """Say whether the checkpoint has vLLM quantise the KV cache where --kv-cache-dtype is auto, as it is by default."""
    return getattr(config.quant_config, "kv_cache_scheme", None) is not None


def _offloads(offload: Any) -> bool:
    """Say whether layers would wait for weights that lie elsewhere: vLLM wraps their forward to that end."""
    prefetches = offload.offload_backend == "prefetch" or offload.prefetch.offload_group_size > 0
    return prefetches or offload.uva.cpu_offload_gb > 0


def _architecture(model: Any) -> str:
    """Return transformers' class of the model, whatever class vLLM would run it by."""
    return (model.architectures or [model.architecture])[0]
