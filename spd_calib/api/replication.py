"""The heads that a plan replicates: what is asked for, against the profile and the model; and where they are."""

from collections.abc import Sequence

from spd_calib.errors import InputError
from spd_calib.formats.drops import Drop, Drops, Point, Strategy
from spd_calib.formats.plan import Budget
from spd_calib.formats.profile import Profile
from spd_calib.parallel.session import Session
from spd_calib.planning.budget_options import Amount, fraction
from spd_calib.planning.candidates import candidates
from spd_calib.planning.replication import Affordable, Replicated, affordable, choose_replicated
from spd_calib.planning.whole_plans import Calibration

from .latency import sizes_of
from .progress import Progress


def affordable_for(profile: Profile, budget: Budget, *, session: Session, share: Amount | None) -> Affordable | None:
    """Return the heads that may be replicated for this share of the weights more; None where none is given."""
    if share is None:
        return None
    if profile.method == "cumulative":
        raise InputError("`replicate` needs what each block costs by itself; profile with the method single or fisher.")
    if Strategy.BLOCK_DROP not in budget.strategies:
        raise InputError("`replicate` needs the strategy block_drop, which is not allowed here; allow it.")
    most = len(attentions(profile, budget)) - 1  # one at the least is left to choose
    if budget.kind == "drop":
        most = min(most, int(budget.value) - len(profile.settled))
    if most < 1:
        raise InputError("`replicate` wants two attentions' sync points to choose among; leave it out, or drop more.")
    return affordable(sizes_of(session), fraction(share, "replicate"), tp=session.tp, most=most)


def attentions(profile: Profile, budget: Budget) -> list[Point]:
    """Return the attentions' sync points that a plan within this budget may drop, in the order of the model."""
    return sorted(c.point for c in candidates(profile, budget) if c.point.sync_point == "attention")


def any_replicated(profile: Profile, budget: Budget, heads: Affordable) -> Drops:
    """Return drops with heads replicated wherever a plan may: for a model that is to measure any of them."""
    points = attentions(profile, budget)
    return Drops({point: Drop(Strategy.BLOCK_DROP, replicated=heads.every) for point in points})


def replicated_heads(
    points: Sequence[Point], heads: Affordable, *, calibration: Calibration, progress: Progress
) -> Replicated:
    """Return at which of `points` heads are replicated, by plans as wholes on a part of the calibration text."""

    def kl_of(plans: Sequence[Drops]) -> list[float]:
        found = calibration.measure_on_part(plans)
        return [found[drops].kl for drops in plans]

    found = choose_replicated(points, heads, kl_of=kl_of)
    progress.say(
        f"heads replicated in {len(found.drops)} blocks: a rank reads {100 * heads.share:.1f} % more weights than dense"
    )
    return found


def whole_blocks_for(drops: Drops, *, session: Session, share: Amount) -> Affordable:
    """Return in how many of the blocks dropped a rank may have all heads, for this share of the weights more.

    Raises InputError where it is none, SpdError where it is less than one KV group in one block.
    """
    points = [Point(block, "attention") for block in drops.blocks("attention")]
    most = sum(drops.strategy(point) == Strategy.BLOCK_DROP for point in points)
    if not most:
        raise InputError("No attention's sync point is dropped by block_drop, so no heads can be replicated.")
    sizes = sizes_of(session)
    heads = affordable(sizes, fraction(share, "replicate"), tp=session.tp, most=most, whole=True)
    if not heads.blocks:
        one = affordable(sizes, 1.0, tp=session.tp, most=1).share
        raise InputError(
            f"`replicate` {share} of the weights is less than all heads of other ranks take in one block, "
            f"{100 * one:.3g} %; allow more, or replicate some of them before recovery, by `plan --replicate`."
        )
    return heads
