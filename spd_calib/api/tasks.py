"""lm-eval tasks that several calls run models on."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from spd_calib.demo.assets import TASKS, tasks_dir
from spd_calib.errors import InputError
from spd_calib.evaluation.options import EvalOptions

if TYPE_CHECKING:
    from spd_calib.evaluation.harness import TaskSuite


@dataclass(frozen=True)
class TaskOptions:
    """`names` of lm-eval tasks, ('demo',) for the three that this package ships.

    `include_path` is a folder with further tasks; `options` says how lm-eval runs them.
    """

    names: Sequence[str]
    include_path: Path | None = None
    options: EvalOptions = field(default_factory=EvalOptions)

    @classmethod
    def of(
        cls,
        names: str | Sequence[str],
        include_path: Path | None = None,
        *,
        limit: int | None = None,
        options: EvalOptions | None = None,
    ) -> "TaskOptions":
        """Return the options with the names in one string, separated by commas, or in a list.

        `limit` is the number of documents of each task, from the first, where `options` are lm-eval's defaults.
        """
        listed = [n for n in names.split(",") if n] if isinstance(names, str) else list(names)
        return cls(listed, include_path, options or EvalOptions(limit=limit))

    def with_batch_size(self, batch_size: int) -> "TaskOptions":
        """Return the same tasks, `batch_size` requests run at a time."""
        return replace(self, options=replace(self.options, batch_size=batch_size))

    def load(self, *, tokenizer: PreTrainedTokenizerBase | None = None, half: int | None = None) -> "TaskSuite":
        """Load the tasks; of their documents every second one, from the first or the second, where `half` is 0 or 1.

        `tokenizer` is needed for a chat template. Raises InputError for tasks that cannot be found, reached or run.
        """
        from spd_calib.evaluation.harness import TaskSuite  # imports lm-eval, which takes seconds

        names, folder = list(self.names), self.include_path
        if names == ["demo"]:
            names, folder = list(TASKS), tasks_dir()
        elif "demo" in names:
            raise InputError("The task `demo` is the three that this package ships, and runs alone; name others apart.")
        return TaskSuite(names, folder, options=self.options, tokenizer=tokenizer, half=half)
