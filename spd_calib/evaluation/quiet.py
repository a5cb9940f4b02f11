"""lm-eval as part of another program: silent, its random numbers its own, its failures one sentence."""

import contextlib
import logging
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from spd_calib.errors import InputError, SpdError

from .options import Seeds

Step = Callable[[], None]  # called whenever lm-eval is done with a request


def no_step() -> None:
    """Do nothing after a request."""


@contextlib.contextmanager
def quiet(step: Step = no_step) -> Iterator[None]:
    """Keep lm-eval off stdout, let it log errors alone, and call `step` where it would move a progress bar."""
    import datasets
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.models.huggingface

    class Steps:
        """Stands in for tqdm, with as much of it as lm-eval uses."""

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
    """Gather what lm-eval says of requests too long for the model in the list that is yielded."""
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


@dataclass(frozen=True)
class RandomState:
    """The states of the random number generators of Python, NumPy and torch (CPU); `seed` starts the other devices'."""

    python: Any
    numpy: Any
    torch: Any
    seed: int


def random_state(seeds: Seeds) -> RandomState:
    """Return where the generators stand now, after whatever followed upon `seeds`."""
    import numpy as np
    import torch

    return RandomState(random.getstate(), np.random.get_state(), torch.get_rng_state(), seeds.torch)


@contextlib.contextmanager
def drawing_from(start: Seeds | RandomState) -> Iterator[None]:
    """Start every random number in lm-eval and its tasks from `start`; afterwards put the CPU's generators back."""
    import numpy as np
    import torch

    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            if isinstance(start, Seeds):
                random.seed(start.python)
                np.random.seed(start.numpy)
                torch.manual_seed(start.torch)
            else:
                torch.manual_seed(start.seed)
                random.setstate(start.python)
                np.random.set_state(start.numpy)
                torch.set_rng_state(start.torch)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextlib.contextmanager
def running(names: Sequence[str]) -> Iterator[None]:
    """Turn what goes wrong while lm-eval runs the tasks `names` into one sentence (InputError)."""
    import torch

    try:
        yield
    except SpdError:
        raise
    except torch.OutOfMemoryError as e:
        raise InputError(
            "The memory does not hold a batch of the tasks; lower the batch size, or let it be auto."
        ) from e
    except Exception as e:
        raise InputError(
            f"lm-eval fails on {', '.join(names)}: {first_line(e)}; leave out the task or the option at fault."
        ) from e


def first_line(e: Exception) -> str:
    """Return what an exception says, in one line and no more than a sentence's length."""
    line = (str(e).strip().splitlines() or [""])[0].rstrip(".")[:200]
    return f"{type(e).__name__}: {line}" if line else type(e).__name__
