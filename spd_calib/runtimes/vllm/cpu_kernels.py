"""Refusing what vLLM has no kernel for on a CPU, or one that computes something else; it would find out minutes later.

Its CPU build chooses kernels by what the processor can do, so a model that runs on one machine does not on another.
"""

from types import SimpleNamespace
from typing import Any

import torch

from spd_calib.errors import InputError
from spd_calib.models.schemes import scheme_of


def check_attention(config: Any) -> None:
    """Raise InputError where the engine that a VllmConfig asks for has no kernel for the model's attention on a CPU."""
    from vllm.platforms import current_platform
    from vllm.utils.import_utils import resolve_obj_by_qualname

    if current_platform.is_cpu():
        model = config.model_config
        asked = SimpleNamespace(use_mla=model.use_mla, use_sparse=False)
        chosen = current_platform.get_attn_backend_cls(config.attention_config.backend, asked)
        backend: Any = resolve_obj_by_qualname(chosen)
        width, known = model.get_head_size(), backend.get_supported_head_sizes()
        if width not in known:
            raise InputError(
                f"vLLM's attention on a CPU has no kernel for heads of width {width}, only of "
                f"{', '.join(map(str, known))}; run the plan on a GPU, or under torchrun."
            )
        dtype = str(model.dtype).removeprefix("torch.")
        if dtype != "bfloat16" and "linear_attention" in (getattr(model.hf_text_config, "layer_types", None) or ()):
            raise InputError(
                f"vLLM's linear attention on a CPU has a kernel for bfloat16 alone, not for {dtype}: start it with "
                "--dtype bfloat16, and check it with --as-served '--dtype bfloat16'."
            )


def check_products(config: Any) -> None:
    """Raise InputError where the engine's products of quantised weights on a CPU are missing or wrong."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or (scheme := scheme_of(config.model_config.hf_config)) is None:
        return
    if "whole numbers" in scheme.weights and not scheme.reads and not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        raise InputError(
            f"vLLM has no kernel on this CPU for weights in {scheme.weights.split(',')[0]} ({scheme.method}), which "
            "needs AVX-512; run the plan on a GPU, or on another CPU."
        )
    if scheme.reads == "8-bit whole numbers" and not multiplies_exactly():
        raise InputError(
            "vLLM's products of 8-bit whole numbers come out wrong on this CPU, which has no VNNI: their sums in 16 "
            "bits overflow; run the plan on a GPU, or on another CPU."
        )


def multiplies_exactly() -> bool:
    """Tell whether vLLM's product of 8-bit whole numbers, by oneDNN, is exact here for the largest ones there are."""
    from vllm import _custom_ops as ops

    inputs, scale = torch.full((4, 64), 127, dtype=torch.int8), torch.ones(1)
    weights = torch.full((32, 64), 127, dtype=torch.int8).t()  # [in, out]
    handler = ops.create_onednn_scaled_mm(weights, scale, torch.float32, False, False)
    found = ops.onednn_scaled_mm(handler, inputs, torch.empty(4, 32), scale, None, None, None)
    return bool((found == 64 * 127**2).all())
