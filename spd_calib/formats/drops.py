"""Drops, the one value that says which sync points of a model are dropped, and how; everything else speaks it."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as validated_dataclass


class Strategy(StrEnum):
    """The ways to treat a sync point (docs/design.md, section 2).

    KEEP_SYNC reduces the ranks' partial sums there; BLOCK_DROP leaves them to the next sync point that is kept, which
    reduces both at once; PLAIN_DROP never reduces them: each rank goes on with its own.
    """

    KEEP_SYNC = "keep_sync"
    BLOCK_DROP = "block_drop"
    PLAIN_DROP = "plain_drop"


Groups = tuple[tuple[int, ...], ...]
"""Numbers of KV groups, by rank (models/shard.py)."""

BITS = (8, 6, 4)
"""The bits a value of a quantised sync may have (parallel/quantised_sync.py)."""

Sublayer = Literal["attention", "mlp"]
SUBLAYERS: tuple[Sublayer, Sublayer] = ("attention", "mlp")


@validated_dataclass(frozen=True, order=True, config=ConfigDict(extra="forbid"))
class Point:
    """A sync point of the model, behind a block's attention or its MLP; they sort in the order the model meets them."""

    block: Annotated[int, Field(ge=0)]
    sync_point: Sublayer

    def __str__(self) -> str:
        """Return 'block 3' or 'block 3 MLP', as tables and messages name it."""
        return f"block {self.block}{' MLP' if self.sync_point == 'mlp' else ''}"


@dataclass(frozen=True)
class Drop:
    """The treatment of one sync point: its strategy and what goes with it.

    `predictors` holds a models.predictor.Predictor for each rank of this process, by rank; the ranks read their
    estimates. Only block_drop can have them: at an attention, whose block's MLPs read them, and at an MLP whose output
    goes through a norm.
    `router` is one more, of block_drop at an attention, the same on all ranks, by which the router of a mixture of
    experts reads more than the stream that all ranks share.
    `bits`, one of BITS, makes a sync that is kept a quantised one: whatever its message settles is sent so; None sends
    it as it is.
    `replicated` are the KV groups of other ranks that each rank computes, too, for what its MLP reads: of block_drop at
    an attention, as many on every rank.
    """

    strategy: Strategy
    predictors: Mapping[int, Any] | None = None
    router: Any | None = None
    bits: int | None = None
    replicated: Groups | None = None

    def __post_init__(self) -> None:
        if self.bits is not None and (self.strategy != Strategy.KEEP_SYNC or self.bits not in BITS):
            raise ValueError(f"{self.strategy} with {self.bits} bits: only a sync that is kept has bits, of {BITS}")
        if self.replicated is not None:
            self._check_replicated(self.replicated)
        if self.predictors is None and self.router is None:
            return
        if self.strategy != Strategy.BLOCK_DROP:
            raise ValueError(f"predictors go with block_drop, not with {self.strategy}")
        if self.predictors is not None:
            object.__setattr__(self, "predictors", MappingProxyType(dict(self.predictors)))

    def _check_replicated(self, replicated: Groups) -> None:
        if self.strategy != Strategy.BLOCK_DROP:
            raise ValueError(f"replicated heads go with block_drop, not with {self.strategy}")
        if len({len(own) for own in replicated}) != 1 or not replicated[0]:
            raise ValueError("every rank replicates as many KV groups as any other, one at the least")
        if any(list(own) != sorted(set(own)) for own in replicated):
            raise ValueError("the KV groups that a rank replicates are named once each, in order")


KEPT = Drop(Strategy.KEEP_SYNC)


@dataclass(frozen=True)
class Drops:
    """The sync points that are not simply kept, and how each is treated: dropped, or kept with fewer bits.

    Immutable and hashable. `by_point` holds all of them, in the order the model meets them; iterating, `len` and `in`
    speak of those that are dropped alone.
    """

    by_point: Mapping[Point, Drop] = field(default_factory=dict)

    def __post_init__(self) -> None:
        treated = {p: d for p, d in sorted(self.by_point.items()) if d != KEPT}
        if any(p.sync_point == "mlp" and d.strategy == Strategy.PLAIN_DROP for p, d in treated.items()):
            raise ValueError("an MLP sync point is kept or block-dropped")
        if any(p.sync_point == "mlp" and d.router is not None for p, d in treated.items()):
            raise ValueError("a router's predictor stands in for an attention's output, not for an MLP's")
        if any(p.sync_point == "mlp" and d.replicated for p, d in treated.items()):
            raise ValueError("only an attention has heads that can be replicated")
        object.__setattr__(self, "by_point", MappingProxyType(treated))

    @classmethod
    def of(cls, strategies: Mapping[Point, Strategy]) -> "Drops":
        """Return the drops that treat each point named by its strategy, without predictors."""
        return cls({point: Drop(strategy) for point, strategy in strategies.items()})

    @classmethod
    def of_blocks(cls, attention: Sequence[str], mlp: Sequence[str] = ()) -> "Drops":
        """Return the drops given by one strategy a block, for the attentions and (default: all kept) for the MLPs."""
        rows: Iterable[tuple[Sublayer, Sequence[str]]] = zip(SUBLAYERS, (attention, mlp), strict=True)
        return cls.of({Point(i, sublayer): Strategy(s) for sublayer, row in rows for i, s in enumerate(row)})

    @classmethod
    def of_bits(cls, bits: Mapping[Point, int]) -> "Drops":
        """Return the drops that keep each point named, by a sync of so many bits."""
        return cls({point: Drop(Strategy.KEEP_SYNC, bits=n) for point, n in bits.items()})

    @property
    def points(self) -> tuple[Point, ...]:
        """Return the points that are dropped, in the order the model meets them."""
        return tuple(p for p, drop in self.by_point.items() if drop.strategy != Strategy.KEEP_SYNC)

    @property
    def bits(self) -> dict[Point, int]:
        """Return the points that are kept by a quantised sync, and its bits."""
        return {p: drop.bits for p, drop in self.by_point.items() if drop.bits is not None}

    @property
    def counted_bits(self) -> dict[int, int]:
        """Return how many syncs are quantised, by their bits, most bits first."""
        return dict(sorted(Counter(self.bits.values()).items(), reverse=True))

    @property
    def replicated(self) -> dict[int, Groups]:
        """Return, by block, the KV groups of other ranks that each rank computes, too."""
        return {p.block: drop.replicated for p, drop in self.by_point.items() if drop.replicated is not None}

    @property
    def streams_differ(self) -> bool:
        """Say whether a point is plain-dropped: from there to the end, the ranks' residual streams differ."""
        return any(drop.strategy == Strategy.PLAIN_DROP for drop in self.by_point.values())

    @property
    def requires_mlp_drop(self) -> bool:
        """Say whether an MLP's sync point is dropped: what a runtime must know how to do ("mlp_drop" in a plan)."""
        return any(p.sync_point == "mlp" for p in self.points)

    def at(self, point: Point) -> Drop:
        """Return how `point` is treated: KEPT where nothing is said of it."""
        return self.by_point.get(point, KEPT)

    def strategy(self, point: Point) -> Strategy:
        """Return the strategy at `point`: keep_sync where it is not dropped."""
        return self.at(point).strategy

    def blocks(self, sync_point: Sublayer) -> list[int]:
        """Return the blocks whose sync point of this kind is dropped."""
        return [p.block for p in self.points if p.sync_point == sync_point]

    def only(self, points: Iterable[Point]) -> "Drops":
        """Return these drops at `points` alone."""
        wanted = set(points)
        return Drops({p: d for p, d in self.by_point.items() if p in wanted})

    def first_difference(self, other: "Drops") -> int | None:
        """Return the first block that these drops treat otherwise than `other` does; None where both are the same.

        Predictors are the same only where they are the same objects.
        """
        either = (p.block for p in (*self.by_point, *other.by_point) if self.at(p) != other.at(p))
        return min(either, default=None)

    def check_fits(self, num_blocks: int) -> None:
        """Raise ValueError for a point that a model of `num_blocks` blocks lacks, or drops behind its very last MLP."""
        last = Point(num_blocks - 1, "mlp")
        for point, drop in self.by_point.items():
            # behind the last MLP no sync point follows that could settle a debt
            if point > last or (point == last and drop.strategy != Strategy.KEEP_SYNC):
                raise ValueError(f"{point} is no sync point that can be dropped in a model of {num_blocks} blocks")

    def __or__(self, other: "Drops") -> "Drops":
        """Return both together; where both treat a point, as `other` does."""
        return Drops({**self.by_point, **other.by_point})

    def __iter__(self) -> Iterator[Point]:
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.points)

    def __bool__(self) -> bool:
        return bool(self.by_point)

    def __contains__(self, point: object) -> bool:
        return self.by_point.get(point, KEPT).strategy != Strategy.KEEP_SYNC  # type: ignore[call-overload]

    def __hash__(self) -> int:
        return hash(tuple((p, d.strategy, d.bits, d.replicated) for p, d in self.by_point.items()))


NOTHING_DROPPED = Drops()
