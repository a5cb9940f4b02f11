"""The cheapest set of every size, from a profile alone, by the interactions."""

from collections.abc import Mapping, Sequence

from spd_calib.formats.common import Provenance
from spd_calib.formats.drops import Drops
from spd_calib.formats.pareto import Pareto, ParetoPoint
from spd_calib.formats.phases import Phase
from spd_calib.formats.plan import Budget
from spd_calib.formats.profile import Comparison, Profile

from .budget_options import strategies_for
from .candidates import candidates, interactions_of
from .latency import LatencyModel


def pareto_of(
    profile: Profile,
    *,
    provenance: Provenance,
    strategies: Sequence[str] | None = None,
    measured: Mapping[Drops, Comparison] | None = None,
    latency: Mapping[Phase, LatencyModel] | None = None,
    sync_bits: int | None = None,
) -> Pareto:
    """Return the cheapest set of every size that these strategies (None: all profiled) allow, and where the knee is.

    `measured` holds whole plans on the calibration text. With `latency`, by phase, each point tells what it saves,
    all syncs that it keeps having `sync_bits`, if given.
    """
    allowed = strategies_for(profile, strategies)
    model = interactions_of(profile, candidates(profile, Budget(kind="max_kl", value=0, strategies=allowed)))
    points = []
    for drops in model.front():
        known = (measured or {}).get(drops)
        dropped = [*profile.settled, *drops]
        points.append(
            ParetoPoint(
                drops=len(dropped),
                predicted_kl=model.kl(drops),
                measured_kl=known.kl if known else None,
                dropped=dropped,
                saved={
                    phase: of_phase.saved(len(dropped), of_phase.rest(len(dropped), sync_bits))
                    for phase, of_phase in (latency or {}).items()
                },
            )
        )
    return Pareto(
        model=profile.model,
        tensor_parallel=profile.tensor_parallel,
        points=points,
        knee=len(profile.settled) + knee([p.predicted_kl for p in points]),
        provenance=provenance,
    )


def knee(costs: Sequence[float]) -> int:
    """Return the index farthest below the line from the first cost to the last (Satopaa et al., "Kneedle", 2011)."""
    last = len(costs) - 1
    below = [costs[0] + (costs[-1] - costs[0]) * i / max(last, 1) - c for i, c in enumerate(costs)]
    return below.index(max(below))
