"""A causal language model that runs a plan on its ranks: transformers' own model with its blocks replaced."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from spd_calib.errors import InputError
from spd_calib.formats.drops import NOTHING_DROPPED, Drop, Drops, Point, Strategy
from spd_calib.formats.phases import ByPhase
from spd_calib.models.architecture import Decoder, HeadCounts, check_divides, find_decoder
from spd_calib.models.hooks import before_each, instead_of_each
from spd_calib.models.parts import LayerParts
from spd_calib.models.predictor import Predictor, check_predictors, check_router_predictor
from spd_calib.models.probe import check_block, find_layers

from .block import Block, Present
from .comm import Comm, SimulatedComm
from .head import FinalNorm, VocabParallelHead
from .nonfinite import first_nonfinite, places_of_dense, places_on_ranks
from .streams import Streams


@dataclass(frozen=True)
class Recording:
    """One batch's way through the model: what entered each block, and what left the final norm."""

    drops: Drops  # what the model ran (TensorParallelLM.running) when this was recorded
    streams: list[Streams]  # entering block 0 .. L-1
    kwargs: list[dict]
    final: Tensor  # as TensorParallelLM.resume returns it


class TensorParallelLM:
    """Runs `model` (which it changes for good) on the ranks of `comm`: the dense model, except within `running`.

    `model` is a transformers causal LM in eval mode. Raises InputError for a model whose sync points cannot be
    dropped, that `comm.size` does not divide, or that differs from the dense one with every sync point kept.
    That last check is left out where the dense form cannot be run, because the model holds one rank's slices only or
    its blocks are not in memory (`sharded`); small_copy.check_small_copy makes it on a small model of the same form.
    """

    def __init__(self, model: PreTrainedModel, comm: Comm, *, sharded: bool = False):
        parts = find_layers(model)
        for p in parts:
            check_divides(HeadCounts.of(p), comm.size)
        decoder = find_decoder(model)
        head = model.get_output_embeddings()
        if decoder is None or not isinstance(head, nn.Linear):
            raise InputError(f"{type(model).__name__} has no plain output head; it cannot be split over ranks.")
        self.model, self.comm = model, comm
        self.num_blocks = len(parts)
        self.estimates = NOTHING_DROPPED  # of branches with a norm: read where drops name no predictors
        self.streamed = False  # whether its blocks' weights are read from disk; of no concern to Streams
        self.module_paths = [f"{decoder.path}.{i}" for i in range(self.num_blocks)]
        probe = _probe_tokens(model)
        dense = None if sharded else self._probe_dense(decoder, parts, probe)
        self._present = Present()
        self.blocks = [
            Block(i, self.num_blocks, parts=p, comm=comm, present=self._present) for i, p in enumerate(parts)
        ]
        decoder.owner.layers = nn.ModuleList(self.blocks)
        self.final_norm = FinalNorm(getattr(decoder.owner, decoder.norm) or nn.Identity())
        setattr(decoder.owner, decoder.norm, self.final_norm)
        self.head = VocabParallelHead(head, comm)
        # what transformers does with the logits behind the head: Granite's divisor, Gemma 2's soft cap
        self._logits_divisor = float(getattr(model.config, "logits_scaling", 1.0))
        self._logits_cap = getattr(model.config, "final_logit_softcapping", None)
        model.set_output_embeddings(self.head)
        if dense is not None:
            self._check_equals_dense(dense, probe)

    @classmethod
    def simulated(cls, model: PreTrainedModel, tp: int) -> "TensorParallelLM":
        """Return the model on `tp` ranks, all of them in this process."""
        return cls(model, SimulatedComm(tp))

    def read_blocks_by(self, hold: Callable[[int], None]) -> None:
        """Call `hold(block index)` whenever that block is about to run; it brings the block's weights into memory."""
        for block in self.blocks:
            block.read_weights = hold
        self.streamed = True

    @property
    def device(self) -> torch.device:
        """Return the device that token ids go to."""
        return self.model.device

    @property
    def mixtures(self) -> list[int]:
        """Return the blocks that are mixtures of experts."""
        return [block.index for block in self.blocks if block.experts is not None]

    @contextmanager
    def running(self, drops: Drops | ByPhase) -> Iterator[None]:
        """Run `drops`, and nothing else, in every forward of the model while this lasts.

        By phase, those of prefill in a forward with more than one new token a sequence, else those of decoding.
        Afterwards the model runs what it ran before. May be nested: the innermost counts. Raises InputError for
        predictors or replicated heads that do not fit the model, ValueError for sync points that it does not have.
        """
        phases, before = ByPhase.of(drops), (self._present.drops, self._present.replicas)
        fitted, replicated = phases.map(self.fitted), phases.decode.replicated
        attentions = [self.blocks[block].replicas(groups).attentions for block, groups in replicated.items()]
        replicas = max((sum(map(len, of_ranks)) for of_ranks in attentions), default=0)
        self._present.drops, self._present.replicas = fitted, replicas
        try:
            yield
        finally:
            self._present.drops, self._present.replicas = before

    def fitted(self, drops: Drops) -> Drops:
        """Return `drops` with their predictors on the model's device and in its dtype.

        Where they name none, those of `estimates` are taken, but for replicated heads. The drops given, and their
        predictors, stay as they are. Raises as `running` does, and for heads that cannot be replicated.
        """
        drops.check_fits(self.num_blocks)
        for block, groups in drops.replicated.items():
            self.blocks[block].replicas(groups)
        if drops.streams_differ and (mixed := self.mixtures):
            raise InputError(
                f"plain_drop cannot be used in this model: block {mixed[0]} is a mixture of experts, and ranks whose "
                "residual streams differ for good would choose different experts; use block_drop."
            )
        return Drops(
            {point: self._fitted(point, self._estimated(point, drop)) for point, drop in drops.by_point.items()}
        )

    def _estimated(self, point: Point, drop: Drop) -> Drop:
        """Return the drop with the predictors of `estimates` where it names none of its own."""
        if drop.strategy != Strategy.BLOCK_DROP or drop.predictors is not None or drop.replicated is not None:
            return drop
        return replace(drop, predictors=self.estimates.at(point).predictors)

    def _fitted(self, point: Point, drop: Drop) -> Drop:
        if drop.predictors is None and drop.router is None:
            return drop
        block = self.blocks[point.block]
        if point.sync_point == "mlp" and block.mlp_out_norm is None:
            raise InputError(f"Block {point.block} has predictors for its MLP's partial sums, and no norm behind them.")
        like = next(block.attentions.parameters())
        router = None if drop.router is None else self._fitted_router(block, drop.router).like(like)
        if drop.predictors is None:
            return replace(drop, router=router)
        if missing := set(self.comm.ranks) - set(drop.predictors):
            raise InputError(f"Block {point.block} has no predictor for rank {min(missing)} of {self.comm.size}.")
        check_predictors(point.block, drop.predictors, d_rank=block.seen_by_a_rank(drop), d=block.width)
        own = {rank: drop.predictors[rank].like(like) for rank in self.comm.ranks}
        return replace(drop, predictors=own, router=router)

    def _fitted_router(self, block: Block, router: Predictor) -> Predictor:
        """Return the router's predictor. Raises InputError for a block without one, or where it is of another width."""
        if block.experts is None:
            raise InputError(f"Block {block.index} has no router that a predictor could serve.")
        check_router_predictor(block.index, router, d=block.width)
        return router

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return logits [B, T, V] for token ids [B, T]; the mask as transformers takes it (0 at padding)."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    @torch.no_grad()
    def record(self, input_ids: Tensor) -> Recording:
        """Run a batch of token ids [B, T] and keep what enters each block, for `resume` to start from.

        It is run as any forward is: under what `running` says, else dense.
        Raises InputError that names the block where NaN or Inf first appears, if any does.
        """
        streams: list[Streams] = []
        kwargs: list[dict] = []

        def keep_input(_: int, hidden_states: Tensor | Streams, others: dict) -> None:
            streams.append(Streams.of(hidden_states))
            kwargs.append(others)

        with before_each(self.blocks, keep_input):
            final, _ = self._run(input_ids)
        if not final.isfinite().all():
            self.refuse_nonfinite(input_ids)
        return Recording(self._present.drops.of_forward(input_ids.shape[1]), streams, kwargs, final)

    @torch.no_grad()
    def enter(self, input_ids: Tensor) -> tuple[Tensor, list[dict]]:
        """Return what enters the first block for token ids [B, T], and what every block is given beside the stream.

        No block is run.
        """
        entered: list[Tensor] = []
        kwargs: list[dict] = []

        def pass_on(_: int, hidden_states: Tensor | Streams, others: dict) -> Streams:
            s = Streams.of(hidden_states)
            entered.append(s.shared)
            kwargs.append(others)
            return s

        with instead_of_each(self.blocks, pass_on):
            self._run(input_ids)
        return entered[0], kwargs

    @torch.no_grad()
    def extend(self, input_ids: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """Run token ids [B, T] behind those whose keys and values are in `cache`, by default none, which grows by them.

        They are run as any forward is. Returns what leaves the final norm, as `resume` does, and the cache.
        """
        final, grown = self._run(input_ids, past_key_values=cache, use_cache=True)
        assert grown is not None
        return final, grown

    def _run(self, input_ids: Tensor, *, use_cache: bool = False, **kwargs: Any) -> tuple[Tensor, Cache | None]:
        """Run all but the head; return what leaves the final norm, and the cache, if any."""
        final: list[Tensor] = []
        hook = self.final_norm.register_forward_hook(lambda m, args, out: final.append(out))
        try:
            out = self.model.base_model(input_ids=input_ids, use_cache=use_cache, **kwargs)
        finally:
            hook.remove()
        return final[0], out.past_key_values

    @torch.no_grad()
    def resume(self, recording: Recording, drops: Drops) -> Tensor:
        """Run a recorded batch under `drops`, from the first block that they treat otherwise than the recording did.

        `drops` are all that is dropped, not an addition to the recording's.
        Returns what leaves the final norm, [B, T, d] or head.PerRank, for `logits`.
        """
        drops = self.fitted(drops)
        first = drops.first_difference(recording.drops)
        if first is None:
            return recording.final
        s = recording.streams[first]
        for block, kwargs in zip(self.blocks[first:], recording.kwargs[first:], strict=True):
            s = block.run(s, drops, **kwargs)
        return self.final_norm(s)

    @torch.no_grad()
    def logits(self, final: Tensor) -> Tensor:
        """Return logits [B, T, V] for what left the final norm."""
        return self.logits_with_gradients(final)

    def logits_with_gradients(self, final: Tensor) -> Tensor:
        """Return what `logits` does, and let gradients through where they are enabled."""
        return self.scaled_logits(self.head(final))

    def scaled_logits(self, logits: Tensor) -> Tensor:
        """Return the model's logits, [..., any part of the vocabulary], from what its head gives."""
        if self._logits_divisor != 1.0:
            logits = logits / self._logits_divisor
        return logits if self._logits_cap is None else (logits / self._logits_cap).tanh() * self._logits_cap

    def refuse_nonfinite(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        """Raise InputError that says where NaN or Inf first appears when the model reads these tokens [B, T].

        Where the ranks are real, all of them call this at once, and raise with the same words.
        """
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            attention_mask = None  # it also covers tokens in a KV cache, which is not there when these run anew
        where = first_nonfinite(
            lambda: self(input_ids, attention_mask),
            places_on_ranks(self.model, self.blocks, self.module_paths, self.head),
            dtype=self.model.dtype,
            comm=self.comm,
        )
        raise InputError(where or "The logits hold NaN or Inf under this plan: it breaks the model; drop less.")

    @contextmanager
    def refusing_nonfinite(self) -> Iterator[None]:
        """Raise, while this lasts, as refuse_nonfinite does after a forward whose logits hold NaN or Inf."""

        def check(_: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            if not output.logits.isfinite().all():
                hook.remove()
                input_ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
                self.refuse_nonfinite(input_ids, kwargs.get("attention_mask"))

        hook = self.model.register_forward_hook(check, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    @torch.no_grad()
    def _probe_dense(self, decoder: Decoder, parts: list[LayerParts], probe: Tensor) -> Tensor:
        """Check the form of every block of the dense model; return its logits on the probe tokens."""
        entered: list[tuple[Tensor, dict]] = []
        with before_each(decoder.layers, lambda i, hidden, others: entered.append((hidden, others))):
            logits = self.model(input_ids=probe, use_cache=False).logits
        if not logits.isfinite().all():
            places = places_of_dense(self.model, self.model.get_output_embeddings(), decoder=decoder, parts=parts)
            where = first_nonfinite(
                lambda: self.model(input_ids=probe, use_cache=False), places, dtype=self.model.dtype
            )
            raise InputError(where or "The model's logits hold NaN or Inf; fetch it again.")
        for i, (layer, p, (hidden, kwargs)) in enumerate(zip(decoder.layers, parts, entered, strict=True)):
            check_block(i, layer, p, hidden, kwargs)
        return logits

    @torch.no_grad()
    def _check_equals_dense(self, dense: Tensor, probe: Tensor) -> None:
        """Raise InputError unless the model with every sync point kept gives `dense`, by a forward and by record.

        Of a mixture in half precision more than half of the tokens must agree: at a few, rounding alone decides which
        expert is chosen.
        """
        for logits in (self(probe), self.logits(self.record(probe).final)):
            off = (logits.float() - dense.float()).abs().amax(-1)
            error = (off.median() if self.mixtures and logits.dtype != torch.float32 else off.max()).item()
            if not error <= tolerance(dense):
                raise InputError(
                    f"{type(self.model).__name__} split over {self.comm.size} ranks, every sync point kept, differs "
                    f"from the dense model by {error:.2g} in logits: it computes something this tool does not know of."
                )


def tolerance(logits: Tensor) -> float:
    """Return how far logits may be off by rounding alone: 1e-4 in float32 (relative where they exceed 1)."""
    scale = max(1.0, logits.float().abs().max().item())
    return scale * (1e-4 if logits.dtype == torch.float32 else 0.1)


def _probe_tokens(model: PreTrainedModel) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, model.config.vocab_size, (2, 16), generator=generator).to(model.device)
