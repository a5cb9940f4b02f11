"""lm-eval tasks that several calls run models on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from spd_calib.demo.assets import TASKS, tasks_dir

if TYPE_CHECKING:
    from spd_calib.evaluation.harness import TaskSuite


@dataclass(frozen=True)
class TaskOptions:
    """`names` of lm-eval tasks, ('demo',) for the three that this package ships.

    `include_path` is a folder with further tasks, `limit` the number of documents of each, from the first.
    """

    names: Sequence[str]
    include_path: Path | None = None
    limit: int | None = None

    @classmethod
    def of(
        cls, names: str | Sequence[str], include_path: Path | None = None, limit: int | None = None
    ) -> "TaskOptions":
        """Return the options with the names in one string, separated by commas, or in a list."""
        return cls([n for n in names.split(",") if n] if isinstance(names, str) else names, include_path, limit)

    def load(self, *, seed: int, half: int | None = None) -> "TaskSuite":
        """Load the tasks; of their documents every second one, from the first or the second, where `half` is 0 or 1.

        Raises InputError for tasks that cannot be found, reached or run.
        """
        from spd_calib.evaluation.harness import TaskSuite  # imports lm-eval, which takes seconds

        if list(self.names) == ["demo"]:
            return TaskSuite(list(TASKS), tasks_dir(), self.limit, seed, half)
        return TaskSuite(list(self.names), self.include_path, self.limit, seed, half)
