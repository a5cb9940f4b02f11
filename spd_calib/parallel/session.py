"""Opening a model for work in two steps: what can be refused cheaply comes first, the weights are read last."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spd_calib.errors import InputError, OtherModel
from spd_calib.formats.common import ModelRef
from spd_calib.formats.drops import NOTHING_DROPPED, Drops
from spd_calib.formats.phases import ByPhase
from spd_calib.models.checkpoint import account, check_weight
from spd_calib.models.fingerprint import config_hash
from spd_calib.models.in_memory import check_in_memory, check_tensors, ref_in_memory, sharing_copy
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
from spd_calib.models.schemes import without_quantisation
from spd_calib.models.shard_load import load_sharded
from spd_calib.models.stream_load import load_streamed, must_stream
from spd_calib.models.text_part import whole_of
from spd_calib.ranks import is_main_rank, world_size

from . import distributed
from .comm import SimulatedComm
from .model import TensorParallelLM
from .small_copy import check_small_copy


@dataclass(frozen=True)
class Session:
    """A model whose configuration and TP size are accepted; `load` reads its weights.

    Either `source` says where it lies on disk, or `model` is the user's own object in memory, which is never changed.
    """

    source: Source | None
    config: Any
    tp: int
    tokenizer: PreTrainedTokenizerBase
    ref: ModelRef
    model: PreTrainedModel | None = None

    @property
    def max_length(self) -> int:
        """Return the number of tokens of the longest sequence the model can read."""
        return self.config.max_position_embeddings

    def load(
        self,
        device: str = "cpu",
        dtype: str = "float32",
        *,
        seed: int = 0,
        stream: bool = False,
        drops: Drops | ByPhase = NOTHING_DROPPED,
    ) -> TensorParallelLM:
        """Return the model on its ranks: under torchrun on real ones, else on simulated ones.

        With `stream`, or where the weights would take more than half of the memory free, simulated ranks read each
        block's weights from disk when it is to run; that the whole equals the dense model is then not checked.
        A real rank can run the replicated heads of `drops`, and no others: more of its attention is loaded for them.
        A model in memory runs where it is and as it is: raises InputError for another device or dtype.
        """
        if self.source is None:
            torch.manual_seed(seed)
            return TensorParallelLM.simulated(self._in_memory(device, dtype), self.tp)
        if world_size() == 1:
            torch.manual_seed(seed)
            if stream or must_stream(self.source, self.config, device=device, dtype=dtype):
                model, weights = load_streamed(self.source, self.config, device=device, dtype=dtype)
                lm = TensorParallelLM(model, SimulatedComm(self.tp), sharded=True)
                lm.read_blocks_by(weights.hold)
                return lm
            dense = load_dense(self.source, self.config, device=device, dtype=dtype)
            return TensorParallelLM.simulated(dense, self.tp)
        comm, device = distributed.start(self.tp), distributed.local_device(device)
        model = load_sharded(
            self.source,
            self.config,
            rank=comm.rank,
            tp=self.tp,
            device=device,
            dtype=dtype,
            whole_attentions=ByPhase.of(drops).decode.replicated,
        )
        torch.manual_seed(seed)  # the same on all ranks: they sample the same tokens
        return TensorParallelLM(model, comm, sharded=True)

    def form(self) -> PreTrainedModel:
        """Return a model of the same form, of which no weight is read: that of a folder has none."""
        if self.source is not None:
            return skeleton(self.source, self.config)
        assert self.model is not None
        return sharing_copy(self.model)

    def check_fits(self, drops: Drops | ByPhase, modules: Sequence[str]) -> None:
        """Raise InputError where `drops` do not fit the model's form, or `modules` are not its decoder layers' paths.

        The form includes the sizes of predictors and the heads that are replicated.
        """
        lm = TensorParallelLM(self.form(), SimulatedComm(self.tp), sharded=True)
        for index, (said, path) in enumerate(zip(modules, lm.module_paths, strict=True)):
            if said != path:
                raise InputError(f"The plan says that block {index} is {said}, but it is {path}; plan anew.")
        ByPhase.of(drops).map(lm.fitted)

    def prompt_ids(self, prompt: str, *, new_tokens: int) -> list[int]:
        """Return a prompt's token ids. Raises InputError for none, or where no `new_tokens` fit behind them."""
        ids = self.tokenizer(prompt)["input_ids"]
        if not ids:
            raise InputError("A prompt holds no token; give `prompt` some words.")
        if len(ids) + new_tokens > self.max_length:
            raise InputError(
                f"A prompt of {len(ids)} tokens and `new_tokens` {new_tokens} are beyond the model's "
                f"{self.max_length}; lower one of them."
            )
        return ids

    def _in_memory(self, device: str, dtype: str) -> PreTrainedModel:
        """Return a copy of the model in memory that shares its weights. Raises InputError where it lies elsewhere."""
        assert self.model is not None
        own = str(self.model.dtype).removeprefix("torch.")
        if torch.empty(0, device=device).device != self.model.device or dtype != own:
            raise InputError(
                f"The model in memory is {own} on {self.model.device}, not {dtype} on {device}; "
                "leave the device and the dtype out, or convert it before with model.to()."
            )
        return sharing_copy(self.model)


def session_in_memory(
    model: Any, tokenizer: PreTrainedTokenizerBase | None, *, tp: int, expected: ModelRef | None = None
) -> Session:
    """Open a transformers model object and its tokenizer for `tp` simulated ranks.

    Raises InputError as open_session does, for an object that is no whole model on one device, for weights that are
    not finite, without a tokenizer, and under torchrun: each rank would need the whole model.
    """
    if world_size() > 1:
        raise InputError("A model in memory runs on simulated ranks alone; name its folder or hub id under torchrun.")
    check_in_memory(model)
    if tokenizer is None:
        raise InputError("A model in memory comes without its tokenizer; give tokenizer, too.")
    check_config(model.config, tp)
    check_tensors(model)
    for name, weight in model.named_parameters():
        check_weight(name, weight, model=model.name_or_path or "the model in memory")
    ref = ref_in_memory(model)
    if expected is not None:
        check_same_model(expected, ref)
    return Session(None, model.config, tp, tokenizer, ref, model)


def open_session(model: str, tp: int, *, expected: ModelRef | None = None, replicas: bool = False) -> Session:
    """Find `model` (a folder or a hub id) for `tp` ranks. `expected` is the reference in a profile or plan made before.

    With `replicas` the processes that torchrun started are no ranks: each simulates all the ranks, on a dense model
    of its own; the caller loads that, since `Session.load` takes torchrun's processes for ranks.

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
    """Return the model's reference; of many ranks only the main one reads the weights to fingerprint them."""
    ref = distributed.from_main_rank(model_ref(source, config) if is_main_rank() else None)
    assert ref is not None
    return ref


def check_same_model(expected: ModelRef, found: ModelRef) -> None:
    """Raise OtherModel, naming what differs, unless both references are of the same weights and configuration."""
    for field, what in (
        ("architecture", "architecture differs"),
        ("num_blocks", "number of blocks differs"),
        ("config_hash", "configuration differs"),
        ("weight_fingerprint", "weights differ"),
    ):
        if getattr(expected, field) != getattr(found, field):
            raise OtherModel(
                f"{found.id} is not the model this file was made for ({expected.id}): the {what}; "
                "name the right one, or profile and plan anew."
            )


def is_quantised_copy(session: Session, *, of: ModelRef) -> bool:
    """Tell whether the session's model is quantised, `of` is not, and their configurations are otherwise the same.

    Whether its weights are those of `of`, to rounding, is not looked at: what it costs has to be measured on it.
    """
    ref = session.ref
    if ref.quantised is None or of.quantised is not None:
        return False
    hashed = config_hash(without_quantisation(whole_of(session.config).to_dict()))
    return (ref.architecture, ref.num_blocks, hashed) == (of.architecture, of.num_blocks, of.config_hash)


def versions() -> dict[str, str]:
    """Return the versions of this package and of the libraries that results depend on, for every file written."""
    from importlib.metadata import version

    return {
        "spd_calib": version("spd-calib"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
