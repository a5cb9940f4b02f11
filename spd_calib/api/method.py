"""The options of a profile's method, checked before anything is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass

from spd_calib.errors import InputError
from spd_calib.formats.drops import SUBLAYERS, Strategy, Sublayer
from spd_calib.formats.profile import Metric
from spd_calib.ranks import world_size

METHODS = ("single", "cumulative", "fisher")
MEASURED = (Strategy.BLOCK_DROP, Strategy.PLAIN_DROP)
TARGET_STDERR = 0.08
METRICS: tuple[Metric, ...] = ("accuracy", "kl", "ppl")


@dataclass(frozen=True)
class Method:
    """The method that `profile` was asked for, all defaults filled in but `target_stderr`; see api.profile.profile."""

    name: str
    strategies: list[Strategy]
    sync_points: list[Sublayer]
    target_stderr: float | None
    confidence: float | None
    rank_by: Metric


def checked_method(
    name: str,
    *,
    strategies: Sequence[str] | None,
    sync_points: Sequence[str],
    target_stderr: float | None,
    confidence: float | None,
    rank_by: str | None,
    tasks: bool,
) -> Method:
    """Return what is asked for; `tasks` says whether lm-eval tasks rank. Raises InputError for what does not fit."""
    if name not in METHODS:
        raise InputError(f"`method` {name!r} is none of {', '.join(METHODS)}.")
    if name == "fisher":
        _check_fisher(target_stderr, rank_by=rank_by, tasks=tasks)
    elif target_stderr is not None:
        raise InputError(f"target_stderr belongs to `method` fisher, not to {name}; leave it out.")
    if confidence is not None and name != "single":
        raise InputError(f"`confidence` belongs to `method` single, not to {name}; leave it out.")
    if confidence is not None and not 0.5 <= confidence < 1:
        raise InputError(f"`confidence` {confidence} is no probability from 0.5 to below 1; 0.95 is a good one.")
    metrics = {metric: metric for metric in METRICS}
    rank_by = rank_by or ("kl" if name == "fisher" else "accuracy")
    if rank_by not in metrics:
        raise InputError(f"rank_by {rank_by!r} is none of {', '.join(METRICS)}.")
    return Method(
        name=name,
        strategies=_strategies(strategies, name),
        sync_points=_sync_points(sync_points, name),
        target_stderr=target_stderr,
        confidence=confidence,
        rank_by=metrics[rank_by],
    )


def _strategies(names: Sequence[str] | None, method: str) -> list[Strategy]:
    if wrong := [n for n in names or [] if n not in MEASURED]:
        raise InputError(f"`strategies` {wrong[0]!r} cannot be measured; it is block_drop or plain_drop.")
    if method == "fisher":
        if Strategy.PLAIN_DROP in (names or []):
            raise InputError("`method` fisher predicts block_drop alone; measure plain_drop with `method` single.")
        return [Strategy.BLOCK_DROP]
    return list(dict.fromkeys(map(Strategy, names or MEASURED)))


def _sync_points(names: Sequence[str], method: str) -> list[Sublayer]:
    if wrong := [name for name in names if name not in SUBLAYERS] or ["" for _ in range(not names)]:
        raise InputError(f"sync_points {wrong[0]!r} is neither attention nor mlp.")
    if method == "cumulative" and "mlp" in names:
        raise InputError(
            "`method` cumulative is the paper's, of the attention's sync points; take single for the MLP's."
        )
    return [sublayer for sublayer in SUBLAYERS if sublayer in names]


def _check_fisher(target_stderr: float | None, *, rank_by: str | None, tasks: bool) -> None:
    if target_stderr is not None and not 0.001 <= target_stderr <= 1:
        raise InputError(f"target_stderr {target_stderr} is no relative error from 0.001 to 1; 0.08 is a good one.")
    if rank_by not in (None, "kl") or tasks:
        raise InputError("`method` fisher predicts KL alone; rank by accuracy or perplexity with `method` single.")
    if world_size() > 1:
        raise InputError("`method` fisher runs on simulated ranks alone; start it without torchrun.")
