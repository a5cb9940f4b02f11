"""One model, opened for work in two steps: what can be refused cheaply first, the weights last."""

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerBase

from spd_calib.errors import InputError
from spd_calib.formats.common import ModelRef
from spd_calib.models.checkpoint import account
from spd_calib.models.load import (
    Source,
    check_config,
    load_dense,
    load_tokenizer,
    locate,
    model_ref,
    read_config,
    skeleton,
)
from spd_calib.models.shard_load import load_sharded
from spd_calib.models.stream_load import load_streamed, must_stream
from spd_calib.ranks import is_main_rank, world_size

from . import distributed
from .comm import Simulated
from .model import TensorParallelLM
from .small_copy import check_small_copy


@dataclass(frozen=True)
class Session:
    """A model whose configuration and TP size are accepted; `load` reads its weights."""

    source: Source
    config: Any
    tp: int
    tokenizer: PreTrainedTokenizerBase
    ref: ModelRef

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence the model can read."""
        return self.config.max_position_embeddings

    def load(
        self, device: str = "cpu", dtype: str = "float32", seed: int = 0, stream: bool = False
    ) -> TensorParallelLM:
        """The model on its ranks, every sync point kept: under torchrun on its ranks, else on simulated ones.

        With `stream`, or where the weights would take more than half of the memory free, simulated ranks read each
        block's weights from disk when it is to run; that the whole equals the dense model is then not checked.
        """
        if world_size() == 1:
            torch.manual_seed(seed)
            if stream or must_stream(self.source, self.config, device=device, dtype=dtype):
                model, weights = load_streamed(self.source, self.config, device=device, dtype=dtype)
                lm = TensorParallelLM(model, Simulated(self.tp), sharded=True)
                lm.read_blocks_by(weights.hold)
                return lm
            dense = load_dense(self.source, self.config, device=device, dtype=dtype)
            return TensorParallelLM.simulated(dense, self.tp)
        comm, device = distributed.start(self.tp), distributed.local_device(device)
        model = load_sharded(self.source, self.config, rank=comm.rank, tp=self.tp, device=device, dtype=dtype)
        torch.manual_seed(seed)  # the same on all ranks: they sample the same tokens
        return TensorParallelLM(model, comm, sharded=True)


def open_session(model: str, tp: int, expected: ModelRef | None = None, replicas: bool = False) -> Session:
    """Find MODEL (a folder or a hub id) for `tp` ranks. `expected` is the reference that a file holds.

    With `replicas` the processes that torchrun started are no ranks: each simulates them all.

    Raises InputError for a model whose form is not supported, that `tp` does not divide, or that is not the one
    expected, and under torchrun for another `tp` than it has ranks.
    """
    if world_size() > 1:
        distributed.start(None if replicas else tp)
    source = locate(model, expected.revision if expected else None)
    config = read_config(source)
    check_config(config, tp)
    account(source, skeleton(source, config))
    check_small_copy(config)
    ref = _ref(source, config)
    if expected is not None:
        check_same_model(expected, ref)
    return Session(source, config, tp, load_tokenizer(source), ref)


def _ref(source: Source, config: Any) -> ModelRef:
    """The model's reference; of many ranks one reads the weights to fingerprint them."""
    ref = distributed.from_main_rank(model_ref(source, config) if is_main_rank() else None)
    assert ref is not None
    return ref


def check_same_model(expected: ModelRef, found: ModelRef) -> None:
    """Raises InputError, naming what differs, unless both references are of the same weights and configuration."""
    for field, what in (
        ("architecture", "architecture"),
        ("num_blocks", "number of blocks"),
        ("config_hash", "configuration"),
        ("weight_fingerprint", "weights"),
    ):
        if getattr(expected, field) != getattr(found, field):
            raise InputError(
                f"{found.id} is not the model this file was made for ({expected.id}): the {what} differs; "
                "name the right one, or profile and plan anew."
            )


def versions() -> dict[str, str]:
    """Versions that stand in every file written."""
    from importlib.metadata import version

    return {
        "spd_calib": version("spd-calib"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
