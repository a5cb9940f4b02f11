"""A causal language model that runs a plan on its ranks: transformers' own model with its blocks replaced."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spd_calib.errors import InputError
from spd_calib.formats.common import Strategy
from spd_calib.models.architecture import Decoder, HeadCounts, LayerParts, check_divides, find_decoder
from spd_calib.models.probe import check_block, find_layers
from spd_calib.models.shard import ALL, is_cut, vocabulary_slice

from .block import Block
from .comm import Comm, Simulated
from .compensation import Compensation
from .finite import first_not_finite, places_of_dense, refuse_not_finite
from .streams import Streams

KEEP, DROP, PLAIN = Strategy.KEEP_SYNC, Strategy.BLOCK_DROP, Strategy.PLAIN_DROP


@dataclass(frozen=True)
class Recording:
    """One batch's way through the model: what entered each block, and what left the final norm."""

    streams: list[Streams]  # entering block 0 .. L-1
    kwargs: list[dict]
    final: Tensor  # as TensorParallelLM.resume returns it


class FinalNorm(nn.Module):
    """Streams to [B, T, d], or, where the ranks' streams differ, [ranks * B, T, d] for the head to take apart."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm

    def forward(self, s: Streams) -> Tensor:
        assert s.debt is None, "the last block settles every debt"
        if s.written_off is None:
            return self.norm(s.shared)
        return torch.cat([self.norm(s.read(i)) for i in range(len(s.written_off))])


class VocabParallelHead(nn.Module):
    """Each rank computes a contiguous part of the vocabulary from its own stream; the last may be shorter."""

    def __init__(self, head: nn.Linear, comm: Comm):
        super().__init__()
        self.weight, self.bias, self.comm = head.weight, head.bias, comm
        self.vocab_size = head.out_features
        own = [vocabulary_slice(self.vocab_size, rank, comm.size) for rank in comm.ranks]
        self.rows = [ALL] if is_cut(head) else own  # of the weight, one slice for each rank of this process
        self.width = -(-self.vocab_size // comm.size)
        self.streams_differ = False

    def forward(self, hidden: Tensor) -> Tensor:
        ranks = len(self.rows)
        streams = hidden.chunk(ranks) if self.streams_differ else [hidden] * ranks
        parts = [
            nn.functional.linear(h, self.weight[rows], None if self.bias is None else self.bias[rows])
            for h, rows in zip(streams, self.rows, strict=True)
        ]
        # made equally wide; only the last parts are not, so what is added stands behind the vocabulary
        width = max(self.width, *(part.shape[-1] for part in parts))
        padded = [p if p.shape[-1] == width else nn.functional.pad(p, (0, width - p.shape[-1])) for p in parts]
        return self.comm.all_gather(padded)[..., : self.vocab_size].contiguous()


class TensorParallelLM:
    """Runs `model` (which it changes for good) on the ranks of `comm`, every sync point kept until told otherwise.

    `model` is a transformers causal LM in eval mode. Raises InputError for a model whose sync points cannot be
    dropped, that `comm.size` does not divide, or that differs from the dense one with every sync point kept.
    Of a model that holds one rank's slices only (`sharded`) the dense form cannot be run, and is not compared with:
    `check_small_copy` asks the same of a small model of the same configuration.
    """

    def __init__(self, model: PreTrainedModel, comm: Comm, sharded: bool = False):
        parts = find_layers(model)
        for p in parts:
            check_divides(HeadCounts.of(p), comm.size)
        decoder = find_decoder(model)
        head = model.get_output_embeddings()
        if decoder is None or not isinstance(head, nn.Linear):
            raise InputError(f"{type(model).__name__} has no plain output head; it cannot be split over ranks.")
        self.model, self.comm = model, comm
        self.num_blocks, self.streamed = len(parts), False
        self.settled = [(KEEP, KEEP)] * self.num_blocks
        self.module_paths = [f"{decoder.path}.{i}" for i in range(self.num_blocks)]
        probe = _probe_tokens(model)
        dense = None if sharded else self._probe_dense(decoder, parts, probe)
        self.blocks = [Block(i, self.num_blocks, p, comm) for i, p in enumerate(parts)]
        decoder.owner.layers = nn.ModuleList(self.blocks)
        self.final_norm = FinalNorm(getattr(decoder.owner, decoder.norm) or nn.Identity())
        setattr(decoder.owner, decoder.norm, self.final_norm)
        self.head = VocabParallelHead(head, comm)
        model.set_output_embeddings(self.head)
        if dense is not None:
            self._check_equals_dense(dense, probe)

    @classmethod
    def simulated(cls, model: PreTrainedModel, tp: int) -> "TensorParallelLM":
        return cls(model, Simulated(tp))

    def read_blocks_by(self, hold: Callable[[int], None]) -> None:
        """Call `hold` with a block's index whenever that block is to run: its weights are elsewhere until then."""
        for block in self.blocks:
            block.read_weights = hold
        self.streamed = True

    @property
    def device(self) -> torch.device:
        return self.model.device

    def set_strategies(self, attention: Sequence[Strategy], mlp: Sequence[Strategy] | None = None) -> None:
        """Set what happens at each block's attention and MLP sync point (default for the latter: kept).

        A sync point that is settled as dropped stays so where it would be kept.
        """
        mlp = mlp or [KEEP] * self.num_blocks
        if len(attention) != self.num_blocks or len(mlp) != self.num_blocks:
            raise ValueError(f"{self.num_blocks} blocks, but {len(attention)} and {len(mlp)} strategies")
        if PLAIN in mlp or mlp[-1] != KEEP:
            raise ValueError("an MLP sync point is kept or block-dropped, and the last one is kept")
        for block, a, m, settled in zip(self.blocks, attention, mlp, self.settled, strict=True):
            block.attention_strategy = a if a != KEEP else settled[0]
            block.mlp_strategy = m if m != KEEP else settled[1]
        self.head.streams_differ = any(block.attention_strategy == PLAIN for block in self.blocks)

    def settle(self, attention: Sequence[Strategy], mlp: Sequence[Strategy]) -> None:
        """From now on, what is dropped here stays dropped: of blocks that were recovered, the sync is no longer right.

        Of a model in which blocks were trained to run without their sync, `keep_all` then means: all but those.
        """
        self.settled = list(zip(attention, mlp, strict=True))
        self.keep_all()

    def set_compensation(self, predictors: Mapping[int, Mapping[int, Compensation]]) -> None:
        """Set the predictors of the blocks named (by block and rank), and none in every other block."""
        for block in self.blocks:
            block.set_compensation(predictors.get(block.index))

    def keep_all(self) -> None:
        self.set_strategies([KEEP] * self.num_blocks)

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits [B, T, V] for token ids [B, T]; the mask as transformers takes it (0 at padding)."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    @torch.no_grad()
    def record(self, input_ids: Tensor) -> Recording:
        """Run a batch of token ids [B, T] and keep what enters each block, for `resume` to start from.

        Raises InputError that names the block where NaN or Inf first appears, if any does.
        """
        streams: list[Streams] = []
        kwargs: list[dict] = []

        def keep_input(_: nn.Module, args: tuple, kw: dict) -> None:
            s = args[0] if args else kw["hidden_states"]
            streams.append(s if isinstance(s, Streams) else Streams(s))
            kwargs.append({k: v for k, v in kw.items() if k != "hidden_states"})

        final: list[Tensor] = []
        hooks = [block.register_forward_pre_hook(keep_input, with_kwargs=True) for block in self.blocks]
        hooks.append(self.final_norm.register_forward_hook(lambda m, args, out: final.append(out)))
        try:
            self.model.base_model(input_ids=input_ids, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        if not final[0].isfinite().all():
            refuse_not_finite(self, input_ids)
        return Recording(streams, kwargs, final[0])

    @torch.no_grad()
    def resume(self, recording: Recording, first: int) -> Tensor:
        """Run blocks `first` to the last under the present strategies; what leaves the final norm, for `logits`."""
        s = recording.streams[first]
        for block, kwargs in zip(self.blocks[first:], recording.kwargs[first:], strict=True):
            s = block(s, **kwargs)
        return self.final_norm(s)

    @torch.no_grad()
    def logits(self, final: Tensor) -> Tensor:
        """Logits [B, T, V] from what left the final norm."""
        return self.head(final)

    @torch.no_grad()
    def _probe_dense(self, decoder: Decoder, parts: list[LayerParts], probe: Tensor) -> Tensor:
        """Check the form of every block of the dense model; its logits on the probe tokens."""
        entered: list[tuple[Tensor, dict]] = []
        hooks = [
            layer.register_forward_pre_hook(
                lambda m, args, kw: entered.append(
                    (args[0] if args else kw["hidden_states"], {k: v for k, v in kw.items() if k != "hidden_states"})
                ),
                with_kwargs=True,
            )
            for layer in decoder.layers
        ]
        try:
            logits = self.model(input_ids=probe, use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()
        if not logits.isfinite().all():
            places = places_of_dense(self.model, self.model.get_output_embeddings(), decoder, parts)
            where = first_not_finite(lambda: self.model(input_ids=probe, use_cache=False), places, self.model.dtype)
            raise InputError(where or "The model's logits hold NaN or Inf; fetch it again.")
        for i, (layer, p, (hidden, kwargs)) in enumerate(zip(decoder.layers, parts, entered, strict=True)):
            check_block(i, layer, p, hidden, kwargs)
        return logits

    @torch.no_grad()
    def _check_equals_dense(self, dense: Tensor, probe: Tensor) -> None:
        """Every sync point kept must be the dense model: in one forward, and block by block."""
        for logits in (self(probe), self.logits(self.record(probe).final)):
            error = (logits.float() - dense.float()).abs().max().item()
            if not error <= tolerance(dense):
                raise InputError(
                    f"{type(self.model).__name__} split over {self.comm.size} ranks, every sync point kept, differs "
                    f"from the dense model by {error:.2g} in logits: it computes something this tool does not know of."
                )


def tolerance(logits: Tensor) -> float:
    """How far logits may be off by rounding alone: 1e-4 in float32 (relative where they exceed 1)."""
    scale = max(1.0, logits.float().abs().max().item())
    return scale * (1e-4 if logits.dtype == torch.float32 else 0.1)


def _probe_tokens(model: PreTrainedModel) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, model.config.vocab_size, (2, 16), generator=generator).to(model.device)
