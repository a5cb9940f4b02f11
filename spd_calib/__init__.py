"""spd-calib from Python: measure, plan, recover, evaluate and check which all-reduces of a language model can go.

Each name is imported when it is first asked for, so that `import spd_calib` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api.bench import bench
    from .api.check import check
    from .api.estimate import estimate_profile
    from .api.evaluate import evaluate
    from .api.latency import LatencyOptions
    from .api.options import RunOptions
    from .api.pareto import pareto
    from .api.plan import plan, plan_with_details
    from .api.profile import profile
    from .api.progress import Progress
    from .api.recover import recover
    from .api.report import report
    from .api.tasks import TaskOptions
    from .api.text import TextSelection
    from .planning.budget_options import BudgetOptions

_PLACES = {
    "bench": "api.bench",
    "check": "api.check",
    "estimate_profile": "api.estimate",
    "evaluate": "api.evaluate",
    "pareto": "api.pareto",
    "plan": "api.plan",
    "plan_with_details": "api.plan",
    "profile": "api.profile",
    "recover": "api.recover",
    "report": "api.report",
    "BudgetOptions": "planning.budget_options",
    "LatencyOptions": "api.latency",
    "Progress": "api.progress",
    "RunOptions": "api.options",
    "TaskOptions": "api.tasks",
    "TextSelection": "api.text",
}
__all__ = [
    "BudgetOptions",
    "LatencyOptions",
    "Progress",
    "RunOptions",
    "TaskOptions",
    "TextSelection",
    "bench",
    "check",
    "estimate_profile",
    "evaluate",
    "pareto",
    "plan",
    "plan_with_details",
    "profile",
    "recover",
    "report",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
