"""Importing this makes torchvision importable beside a torch without CUDA, as vLLM's models of images want it.

torchvision's Linux build links against CUDA's torch, so its own operators do not load; two of them must be declared all
the same before it can be imported. Nothing calls them. It lies beside the environment (Makefile), for whoever asks.
"""

import sys
from pathlib import Path

import torch

OPERATORS = torch.library.Library("torchvision", "DEF")  # declared for as long as this lives
for name in ("nms", "qnms"):
    OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
sys.path.append(str(Path(sys.prefix) / "torchvision"))

from vllm.model_executor.models import registry  # noqa: E402

registry._run_in_subprocess = lambda inspect: inspect()  # another process would not find torchvision
