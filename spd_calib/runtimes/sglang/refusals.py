"""Finding what SGLang was asked for that would make it compute something else than a plan was measured with.

The names are those of SGLang's `ServerArgs`, its command line's with underscores.
"""

from collections.abc import Callable
from typing import Any

CHECKPOINTS = ("auto", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer")
"""The values of --load-format that read the very files whose weights were fingerprinted."""

AS_MEASURED: tuple[tuple[str, tuple[str, ...], tuple[Any, ...]], ...] = (
    ("pipeline parallelism", ("pp_size",), (1,)),
    ("data parallelism", ("dp_size", "attn_dp_size", "moe_dp_size", "dwdp_size"), (1,)),
    ("context parallelism", ("attn_cp_size", "dcp_size"), (1,)),
    ("expert parallelism", ("ep_size",), (1,)),
    (
        "tokens divided over the ranks",
        (
            "enable_layernorm_sp",
            "enable_attn_tp_input_scattered",
            "enable_cp_decode_attn_tp",
            "enable_kv_cache_sharding",
        ),
        (False,),
    ),
    ("all-reduces in 8 bits", ("enable_quant_communications",), (False, None)),
    ("all-reduces in symmetric memory", ("enable_symm_mem",), (False,)),
    ("a quantised model", ("quantization", "modelopt_quant", "rl_quant_profile"), (None,)),
    ("a quantised model", ("quantize_and_serve",), (False,)),
    ("LoRA adapters", ("lora_paths",), (None, [], {})),
    ("LoRA adapters", ("enable_lora",), (False, None)),
    ("speculative decoding", ("speculative_algorithm",), (None,)),
    ("a diffusion model's decoding", ("dllm_algorithm",), (None,)),
    (
        "layers overlapped or split",
        ("enable_two_batch_overlap", "enable_single_batch_overlap", "enable_pdmux"),
        (False,),
    ),
    ("kernels of whole layers", ("enable_nvidia_megakernel", "enable_amd_monokernel"), (False,)),
    ("layers compiled by torch.compile", ("enable_torch_compile",), (False,)),
    ("weights offloaded to the CPU", ("cpu_offload_gb",), (0,)),
    ("weights offloaded to the CPU", ("offload_group_size",), (-1, 0)),
    ("weights that leave the memory", ("enable_memory_saver",), (False,)),
    ("weights of another process", ("weight_cache_mode",), ("off",)),
    ("weights that come late", ("startup_weight_load_mode",), ("serial",)),
    ("weights that come late", ("checkpoint_engine_wait_weights_before_ready",), (False,)),
    ("weights by a loader of your own", ("custom_weight_loader",), (None, [])),
    ("weights by this --load-format", ("load_format",), CHECKPOINTS),
    ("a configuration changed by --json-model-override-args", ("json_model_override_args",), ("{}",)),
    ("layers by this --model-impl", ("model_impl",), ("auto", "sglang")),
    ("a KV cache that is kept or filled elsewhere", ("disaggregation_mode",), ("null",)),
    ("a KV cache that is kept or filled elsewhere", ("hicache_storage_backend", "radix_cache_backend"), (None,)),
    (
        "a KV cache that is kept or filled elsewhere",
        ("enable_lmcache", "enable_flexkv", "enable_unified_cache_external_linker"),
        (False,),
    ),
    ("hidden states that are given back", ("enable_return_hidden_states", "enable_return_aux_hidden_states"), (False,)),
    ("a model that embeds", ("is_embedding",), (False,)),
    ("layers as a trainer runs them", ("rl_on_policy_target",), (None,)),
    ("this --device", ("device",), ("cuda", "cpu")),
)
"""(what it is, the arguments, the values that they may have)."""


def not_as_measured(value: Callable[[str], Any], *, dtype: str) -> str | None:
    """Return what would make the engine compute something else than was measured; None for nothing.

    `value(name)` gives an argument as SGLang has resolved it, `dtype` is the one the model is served in.
    """
    for what, names, allowed in AS_MEASURED:
        for name in names:
            if (found := value(name)) not in allowed:
                return f"{what} (--{name.replace('_', '-')} {found})"
    if (cache := value("kv_cache_dtype")) not in ("auto", dtype):
        return f"a KV cache in another dtype (--kv-cache-dtype {cache})"
    return None
