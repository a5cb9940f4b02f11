"""Looking at the residual stream as transformers hands it to its modules, by keyword or by position."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def before_each(modules: Iterable[nn.Module], look: Callable[[int, Any, dict], None]) -> Iterator[None]:
    """Call `look(i, hidden_states, other keyword arguments)` whenever the i-th module is to run, while this lasts."""

    def hook_of(i: int) -> Callable[[nn.Module, tuple, dict], None]:
        def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
            others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            look(i, args[0] if args else kwargs["hidden_states"], others)

        return hook

    hooks = [m.register_forward_pre_hook(hook_of(i), with_kwargs=True) for i, m in enumerate(modules)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
