"""The whole front, from a profile alone: the cheapest set of every size, by the interactions."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from spd_calib.errors import InputError
from spd_calib.formats.common import Provenance, Strategy
from spd_calib.formats.front import Front, FrontPoint
from spd_calib.formats.plan import Budget
from spd_calib.formats.profile import Comparison, Point, Profile

from .search import candidates, interactions_of

if TYPE_CHECKING:  # which imports torch
    from .latency import LatencyModel


def front_of(
    profile: Profile,
    strategies: Sequence[str] | None,
    provenance: Provenance,
    measured: Mapping[frozenset[Point], Comparison],
    latency: Mapping[str, "LatencyModel"] | None = None,
) -> Front:
    """`strategies` as given, None for all profiled; `measured`: whole sets on the calibration text.

    With `latency`, by phase, each point tells what it saves.
    """
    if wrong := [s for s in strategies or [] if s not in list(Strategy)]:
        raise InputError(f"--strategy {wrong[0]!r} is none of {', '.join(Strategy)}.")
    allowed = list(map(Strategy, strategies or profile.strategies))
    cost = interactions_of(profile, candidates(profile, Budget(kind="max_kl", value=0, strategies=allowed)))
    points = []
    for chosen in cost.front():
        known = measured.get(frozenset(cost.points_of(chosen)))
        dropped = [*profile.settled, *cost.points_of(chosen)]
        points.append(
            FrontPoint(
                drops=len(dropped),
                predicted_kl=cost.kl(chosen),
                measured_kl=known.kl if known else None,
                dropped=dropped,
                saved={phase: model.saved(len(dropped)) for phase, model in (latency or {}).items()},
            )
        )
    return Front(
        model=profile.model,
        tensor_parallel=profile.tensor_parallel,
        points=points,
        knee=len(profile.settled) + knee([p.predicted_kl for p in points]),
        provenance=provenance,
    )


def knee(costs: Sequence[float]) -> int:
    """The index farthest below the straight line from the first to the last (Satopaa et al., "Kneedle", 2011)."""
    last = len(costs) - 1
    below = [costs[0] + (costs[-1] - costs[0]) * i / max(last, 1) - c for i, c in enumerate(costs)]
    return below.index(max(below))
