"""Choosing where heads are replicated: where the plan's KL falls most for the weights that a rank may read more.

A block with all heads of other ranks replicated is the dense block without its sync, so what its attention's sync point
costs falls away. All such blocks cost alike, and what each wins is measured: the KL of the plan that drops every
attention's sync point, with its heads replicated and without. The block that wins most is taken, then the one that wins
most beside it, and so on; what a rank may read beyond the last whole block goes to some KV groups of one more.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from spd_calib.errors import InputError, SpdError
from spd_calib.formats.drops import NOTHING_DROPPED, Drop, Drops, Groups, Point, Strategy
from spd_calib.formats.profile import Profile
from spd_calib.models.shard import num_groups, own_groups

from .model_sizes import NOTHING_ADDED, Added, ModelSizes, added_by_heads, weights_read


@dataclass(frozen=True)
class Affordable:
    """The heads that may be replicated: in `blocks` blocks `every` KV group of other ranks, in one more `some`, if any.

    `added` is what all of them add to a rank, `share` its weights as a share of what a dense rank reads.
    """

    blocks: int
    every: Groups
    some: Groups | None
    added: Added
    share: float

    @property
    def in_order(self) -> list[tuple[Groups, int]]:
        """Return the KV groups to give out, and to how many blocks."""
        return [(groups, n) for groups, n in ((self.every, self.blocks), (self.some, 1)) if groups and n]


@dataclass(frozen=True)
class Replicated:
    """The blocks chosen, whose attentions' sync points are dropped with heads replicated, and why, by block."""

    drops: Drops = NOTHING_DROPPED
    reasons: Mapping[int, str] = field(default_factory=dict)


def affordable(sizes: ModelSizes, share: float, *, tp: int, most: int, whole: bool = False) -> Affordable:
    """Return the heads in at most `most` blocks that add no more than `share` of the weights that a dense rank reads.

    With `whole` all heads of a block or none of them. Raises InputError for a single rank, SpdError where that share is
    less than one KV group.
    """
    if tp == 1:
        raise InputError("A single rank has every head already; leave `replicate` out.")
    dense, others = weights_read(sizes, tp=tp), num_groups(sizes.counts, tp) * (tp - 1) // tp
    prices = {n: added_by_heads(sizes, following(sizes, n, tp=tp), tp=tp) for n in range(1, others + 1)}
    left = share * dense
    blocks = min(int(left / prices[others].weights + 1e-9), most)
    left -= blocks * prices[others].weights
    within = [n for n, price in prices.items() if price.weights <= left and n < others and blocks < most]
    if not blocks and not within:
        least = prices[1].weights / dense
        raise SpdError(
            f"`replicate` {100 * share:.3g}% of the weights is less than one KV group takes in one block, "
            f"{100 * least:.3g} %; allow more, or leave it out."
        )
    within = [] if whole else within
    added = sum([prices[others]] * blocks + [prices[n] for n in within[-1:]], start=NOTHING_ADDED)
    some = following(sizes, within[-1], tp=tp) if within else None
    return Affordable(blocks, following(sizes, others, tp=tp), some, added, added.weights / dense)


def following(sizes: ModelSizes, n: int, *, tp: int) -> Groups:
    """Return for each rank the n KV groups that follow its own, past the last one from the first on."""
    total = num_groups(sizes.counts, tp)
    starts = [own_groups(sizes.counts, rank, tp).stop for rank in range(tp)]
    return tuple(tuple(sorted((start + i) % total for i in range(n))) for start in starts)


def choose_replicated(
    points: Sequence[Point], heads: Affordable, *, kl_of: Callable[[Sequence[Drops]], Sequence[float]]
) -> Replicated:
    """Return at which of `points`, attentions' sync points that may be dropped, heads are replicated.

    `kl_of` measures plans as wholes. What a block wins shrinks as others are taken, so a block is measured anew only
    while it would be the next.
    """
    plan, chosen, reasons = Drops.of(dict.fromkeys(points, Strategy.BLOCK_DROP)), NOTHING_DROPPED, dict[int, str]()
    (kl,) = kl_of([plan])
    for groups, count in heads.in_order:
        options = {p: Drops({p: Drop(Strategy.BLOCK_DROP, replicated=groups)}) for p in points if p not in chosen}
        found = kl_of([plan | option for option in options.values()])
        wins = {p: kl - k for p, k in zip(options, found, strict=True)}
        up_to_date = set(options)
        for _ in range(count):
            while (best := max(wins, key=wins.__getitem__)) not in up_to_date:
                (k,) = kl_of([plan | options[best]])
                wins[best] = kl - k
                up_to_date.add(best)
            win = wins.pop(best)
            plan, chosen, kl, up_to_date = plan | options[best], chosen | options[best], kl - win, set()
            each = len(groups[0])
            which = "all heads" if groups == heads.every else f"{each} KV group{'s' if each > 1 else ''}"
            reasons[best.block] = f"{which} of other ranks replicated: KL {win:.3g} less where every block is dropped"
    return Replicated(chosen, reasons)


def without(profile: Profile, points: Drops) -> Profile:
    """Return the profile of what is left to choose, where these sync points are dropped in any case."""
    fisher = profile.fisher
    if fisher is not None:
        places = [i for i, term in enumerate(fisher.terms) if not any(p in points for p in term)]
        keep = set(places)
        triangles = {
            name: rows and [[v for j, v in enumerate(rows[i], i) if j in keep] for i in places]
            for name, rows in (("matrix", fisher.matrix), ("stderr", fisher.stderr))
        }
        fisher = fisher.model_copy(update={"terms": [fisher.terms[i] for i in places], **triangles})
    measurements = [m for m in profile.measurements if Point(m.block, m.sync_point) not in points]
    return profile.model_copy(update={"measurements": measurements, "fisher": fisher})
