"""What a test has every worker do: remember, bit by bit, the residual streams that leave each of its layers."""

import hashlib
from typing import Any

import torch

from spd_calib.runtimes.vllm.extension import CheckExtension


class StreamsExtension(CheckExtension):
    def spd_watch(self: Any, deferred: list[int]) -> None:
        """Begin anew. `deferred`: the layers whose MLP sync point is dropped; their debt is left out."""
        for handle in vars(self).get("spd_handles", []):
            handle.remove()
        layers = self.model_runner.get_model().model.layers
        self.spd_digests = [hashlib.sha256() for _ in layers]
        self.spd_handles = [
            layer.register_forward_hook(_remember(digest, deferred=i in deferred))
            for i, (layer, digest) in enumerate(zip(layers, self.spd_digests, strict=True))
        ]

    def spd_streams(self: Any) -> dict[str, list[str]]:
        """One digest a layer, over everything since spd_watch."""
        return {"layers": [digest.hexdigest() for digest in self.spd_digests]}


def _remember(digest: Any, deferred: bool) -> Any:
    def hook(layer: Any, args: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        hidden, residual = output
        for stream in [residual] if deferred else [residual, hidden]:
            digest.update(stream.contiguous().view(torch.uint8).numpy().tobytes())

    return hook
