"""Drops as JSON, for vLLM's configuration and its calls to workers. Predictors stay in their file."""

from collections.abc import Iterable
from typing import Any

from spd_calib.formats.drops import Drops, Point, Strategy


def to_rows(drops: Drops) -> list[dict[str, Any]]:
    """Return one row {block, sync_point, strategy} for each sync point dropped."""
    return [{"block": p.block, "sync_point": p.sync_point, "strategy": str(drops.strategy(p))} for p in drops]


def from_rows(rows: Iterable[dict[str, Any]]) -> Drops:
    """Return the drops that `to_rows` made rows of, without predictors."""
    return Drops.of({Point(row["block"], row["sync_point"]): Strategy(row["strategy"]) for row in rows})
