"""lm-eval tasks by name: found, loaded, and their requests built once, quietly and without a network where possible."""

import contextlib
import difflib
import logging
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from spd_calib.errors import InputError, SpdError

Step = Callable[[], None]  # called whenever lm-eval is done with a request
LIST_THEM = "`spd-calib lm-eval ls tasks` lists all, and --include-path DIR adds your own"


def load_tasks(
    names: Sequence[str], include_path: Path | None, limit: int | None, seed: int, half: int | None = None
) -> Any:
    """lm-eval's dictionary of "tasks" and "groups", every task's requests built from its first `limit` documents.

    With `half` 0 or 1 from every second of these; which ones then stands under "documents", by task.
    `names` are lm-eval's: tasks, groups, tags, patterns such as arc_*, or paths of YAML files. The requests are the
    same in every run: the few-shot examples are drawn once, from `seed`. Raises InputError for tasks that cannot be
    found, reached or run.
    """
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise InputError(f"No task is named; {LIST_THEM}.")
    if limit is not None and limit < 1:
        raise InputError(f"A limit of {limit} documents leaves nothing to evaluate; give 1 or more, or none.")
    if include_path is not None and not include_path.is_dir():
        raise InputError(f"There is no folder {include_path} of tasks; name one that holds lm-eval's YAML files.")
    loaded: dict[str, dict] = {"tasks": {}, "groups": {}, "documents": {}}
    with quiet(), seeded(seed):
        manager = _manager(names, include_path)
        for name in _known(names, manager):
            for kind, found in _load(manager, name).items():
                if kind in ("tasks", "groups"):
                    loaded[kind].update(found)
        for name, task in loaded["tasks"].items():
            if half is not None:
                loaded["documents"][name] = list(range(len(task.eval_docs))[:limit][half::2])
            _build_requests(name, task, limit, seed, loaded["documents"].get(name))
    return loaded


def _manager(names: Sequence[str], include_path: Path | None) -> Any:
    """lm-eval's task manager; reading its own 14,000 tasks takes seconds and is left out where no name needs them."""
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        own = TaskManager(include_path=include_path, include_defaults=False)
        if set(names) <= set(own.all_subtasks):
            return own
    return TaskManager(include_path=include_path)


def _known(names: Sequence[str], manager: Any) -> list[str]:
    """The names with patterns replaced by what they match. Raises InputError for one that matches nothing."""
    known: list[str] = []
    for name in names:
        matching = [name] if name in manager.task_index or Path(name).is_file() else manager.match_tasks([name])
        if not matching:
            close = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f" (perhaps {close[0]}?)" if close else ""
            raise InputError(f"lm-eval knows no task {name!r}{hint}; {LIST_THEM}.")
        known += [m for m in matching if m not in known]
    return known


def _load(manager: Any, name: str) -> Any:
    try:
        return manager.load([name])
    except Exception as e:
        from datasets.exceptions import DatasetNotFoundError

        if isinstance(e, ConnectionError | DatasetNotFoundError) or "offline" in type(e).__name__.lower():
            raise InputError(
                f"The data of task {name} cannot be reached ({first_line(e)}); get it where there is a network, or "
                "name a task with local data and its folder with --include-path."
            ) from e
        raise InputError(f"The task {name} cannot be loaded: {first_line(e)}; mend it or leave it out.") from e


def _build_requests(name: str, task: Any, limit: int | None, seed: int, documents: list[int] | None) -> None:
    """Build a task's requests, for good: lm-eval would draw other few-shot examples each time it is asked."""
    if getattr(task, "UNSAFE_CODE", False):
        raise InputError(
            f"The task {name} runs code that the model writes, which is unsafe; leave it out, or run it with "
            "`spd-calib lm-eval run --model spd_calib --confirm_run_unsafe_code` where no harm can be done."
        )
    if getattr(task, "MULTIMODAL", False):
        raise InputError(f"The task {name} needs images or sound, and the model reads text alone; leave it out.")
    if documents is not None and len(documents) < 2:
        raise InputError(f"The task {name} has too few documents to choose by the one half and verify on the other.")
    task.set_fewshot_seed(seed)
    try:
        task.build_all_requests(limit=None if documents else limit, samples=documents)
    except Exception as e:
        raise InputError(f"The requests of task {name} cannot be built: {first_line(e)}; leave it out.") from e
    task.build_all_requests = lambda **_: None


@contextlib.contextmanager
def quiet(step: Step = lambda: None) -> Iterator[None]:
    """While it lasts lm-eval prints nothing on stdout, logs errors alone, and calls `step` in place of its bars."""
    import datasets
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.models.huggingface

    class Steps:
        """What lm-eval uses of tqdm."""

        def __init__(self, items: Any = (), **_: Any):
            self.items = items

        def __iter__(self) -> Iterator:
            return iter(self.items)

        def update(self, n: int = 1) -> None:
            step()

        def close(self) -> None:
            pass

    modules: list[Any] = [lm_eval.api.model, lm_eval.api.task, lm_eval.models.huggingface]
    loggers = [logging.getLogger(name) for name in ("lm_eval", "huggingface_hub", "datasets")]
    bars, levels = [m.tqdm for m in modules], [logger.level for logger in loggers]
    datasets_bars = datasets.is_progress_bar_enabled()
    try:
        for m in modules:
            m.tqdm = Steps
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        datasets.disable_progress_bars()
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        for m, bar in zip(modules, bars, strict=True):
            m.tqdm = bar
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if datasets_bars:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def watching_truncation() -> Iterator[list[str]]:
    """While it lasts, what lm-eval says of requests too long for the model goes into the list that is yielded."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "truncat" in (message := record.getMessage()).lower():
                said.append(message)

    logger, listener = logging.getLogger("lm_eval.models.huggingface"), Listener()
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    logger.addHandler(listener)
    try:
        yield said
    finally:
        logger.removeHandler(listener)
        logger.propagate = propagate
        logger.setLevel(level)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Everything random in lm-eval and its tasks starts from `seed`; the CPU's generators are then put back."""
    import numpy as np
    import torch

    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextlib.contextmanager
def running(names: Sequence[str]) -> Iterator[None]:
    """Turn what goes wrong while lm-eval runs tasks into one sentence (InputError)."""
    import torch

    try:
        yield
    except SpdError:
        raise
    except torch.OutOfMemoryError as e:
        raise InputError("The memory does not hold a batch of the tasks; lower --batch-size.") from e
    except Exception as e:
        raise InputError(
            f"lm-eval fails on {', '.join(names)}: {first_line(e)}; leave out the task at fault (--debug shows where)."
        ) from e


def first_line(e: Exception) -> str:
    """What an exception says, in one line and no more than a sentence's length."""
    line = (str(e).strip().splitlines() or [""])[0].rstrip(".")[:200]
    return f"{type(e).__name__}: {line}" if line else type(e).__name__
