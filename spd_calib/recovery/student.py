"""A block of the planned model that recovery changes: its own weights, and the predictors its ranks have."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from spd_calib.formats.drops import Drops, Groups, Strategy
from spd_calib.models.architecture import HeadCounts, layer_parts
from spd_calib.models.parts import LayerParts
from spd_calib.models.predictor import Predictor, check_predictors
from spd_calib.parallel.block import Block
from spd_calib.parallel.streams import Streams


@dataclass(frozen=True, eq=False)
class Student:
    """A decoder layer, the Block that runs it on the ranks, and how its own two sync points are dropped.

    Treatments change the layer's weights in place; everything else is replaced as a whole.
    """

    layer: nn.Module
    parts: LayerParts
    block: Block
    drops: Drops

    @classmethod
    def of(cls, layer: nn.Module, like: Block, drops: Drops) -> "Student":
        """Return the student that runs `layer` as `like` runs the dense model's block of the same place.

        Of `drops` those at the block's own sync points count.
        """
        parts = layer_parts(layer)
        assert parts is not None, "the dense layer was accepted"
        block = Block(like.index, like.num_blocks, parts=parts, comm=like.comm, present=like.present)
        return cls(layer, parts, block, drops.only([block.attention_point, block.mlp_point]))

    @property
    def index(self) -> int:
        """Return the block's place in the model."""
        return self.block.index

    @property
    def counts(self) -> HeadCounts:
        return HeadCounts.of(self.parts)

    @property
    def strategy(self) -> Strategy:
        """Return how the attention's sync point is treated."""
        return self.drops.strategy(self.block.attention_point)

    @property
    def predictors(self) -> Mapping[int, Predictor] | None:
        """Return the predictors by rank; None where the ranks' MLPs read their own partial sums."""
        return self.drops.at(self.block.attention_point).predictors

    @property
    def replicated(self) -> Groups | None:
        """Return the KV groups of other ranks that each rank computes, too, by rank; None where there are none."""
        return self.drops.at(self.block.attention_point).replicated

    @property
    def seen_by_a_rank(self) -> int:
        """Return the width of the head outputs that a rank's predictor reads."""
        return self.block.seen_by_a_rank(self.drops.at(self.block.attention_point))

    @property
    def has_every_head(self) -> bool:
        """Say whether every rank computes all heads, its own and replicated ones."""
        return self.seen_by_a_rank == self.parts.o.in_features

    @property
    def router(self) -> Predictor | None:
        """Return the predictor of the block's router; None where that reads the shared stream alone."""
        return self.drops.at(self.block.attention_point).router

    def run(self, streams: Streams, **kwargs) -> Streams:
        """Run the block with its sync points dropped; kwargs as transformers hands them to its layers."""
        return self.block.run(streams, self.drops, **kwargs)

    def copy(self) -> "Student":
        """Return another student with weights and predictors of its own, in memory."""
        self.block.hold_weights()
        other = Student.of(copy.deepcopy(self.layer), self.block, self.drops)
        own = None if self.predictors is None else {r: copy.deepcopy(p) for r, p in self.predictors.items()}
        return other.with_predictors(own).with_router(copy.deepcopy(self.router))

    def with_predictors(self, predictors: Mapping[int, Predictor] | None) -> "Student":
        """Return the same student (the same weights) with these predictors, by rank, in place of those it has.

        Raises InputError for predictors that do not fit the block.
        """
        if predictors is not None:
            check_predictors(self.index, predictors, d_rank=self.seen_by_a_rank, d=self.block.width)
            like = next(self.block.mlps.parameters())
            predictors = {rank: predictors[rank].like(like) for rank in self.block.comm.ranks}
        return self._with(predictors=predictors)

    def with_router(self, router: Predictor | None) -> "Student":
        """Return the same student with this predictor of its router in place of the one it has."""
        return self._with(router=router and router.like(next(self.block.mlps.parameters())))

    def _with(self, **changes: Any) -> "Student":
        point = self.block.attention_point
        return replace(self, drops=self.drops | Drops({point: replace(self.drops.at(point), **changes)}))

    def trainable(self) -> list[nn.Parameter]:
        """Return the parameters that training changes: the layer's weights, each once, and the predictors'."""
        predictors = [*(self.predictors or {}).values(), *([] if self.router is None else [self.router])]
        return [*self.layer.parameters(), *(parameter for p in predictors for parameter in p.parameters())]

    def state(self) -> dict[str, Tensor]:
        """Return weights and predictors by name, on the CPU; `with_state` takes them back."""
        self.block.hold_weights()
        tensors = {f"layer.{name}": t for name, t in self.layer.state_dict().items()}
        for rank, predictor in (self.predictors or {}).items():
            tensors |= {f"compensation.{rank}.{name}": t for name, t in predictor.named_parameters()}
        if self.router is not None:
            tensors |= {f"router.{name}": t for name, t in self.router.named_parameters()}
        return {name: t.detach().cpu().contiguous() for name, t in tensors.items()}

    def with_state(self, tensors: Mapping[str, Tensor]) -> "Student":
        """Return a copy of the student with the weights and predictors that `state` returned.

        Raises ValueError for the state of another layer.
        """
        other, prefix = self.copy(), "layer."
        own = {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)}
        if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in other.layer.state_dict().items()}:
            raise ValueError("the state is of another layer")
        other.layer.load_state_dict(own)
        of_ranks: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("compensation."):
                _, rank, part = name.split(".")
                of_ranks.setdefault(int(rank), {})[part] = _as_fitted(part, tensor)
        router = {n.removeprefix("router."): t.clone() for n, t in tensors.items() if n.startswith("router.")}
        other = other.with_router(Predictor(**router) if router else None)
        return other.with_predictors({rank: Predictor(**parts) for rank, parts in of_ranks.items()} or None)


def _as_fitted(part: str, tensor: Tensor) -> Tensor:
    """Return a copy of a predictor's tensor, laid out in memory as predictor_fit leaves it.

    A product rounds by the layout: a run that goes on is to give the same bits as one that was not interrupted.
    """
    return tensor.T.clone(memory_format=torch.contiguous_format).T if part == "b" else tensor.clone()
