"""Looking at the residual stream as transformers hands it to its modules, by keyword or by position; or taking it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def before_each(modules: Iterable[nn.Module], look: Callable[[int, Any, dict], None]) -> Iterator[None]:
    """Call `look(i, hidden_states, other keyword arguments)` whenever the i-th module is to run, while this lasts."""

    def hook_of(i: int) -> Callable[[nn.Module, tuple, dict], None]:
        def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
            look(i, *_read(args, kwargs))

        return hook

    hooks = [m.register_forward_pre_hook(hook_of(i), with_kwargs=True) for i, m in enumerate(modules)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def instead_of_each(modules: Sequence[nn.Module], run: Callable[[int, Any, dict], Any]) -> Iterator[None]:
    """Call `run(i, hidden_states, other keyword arguments)` in place of the i-th module, while this lasts."""

    def forward_of(i: int) -> Callable[..., Any]:
        return lambda *args, **kwargs: run(i, *_read(args, kwargs))

    for i, module in enumerate(modules):
        module.forward = forward_of(i)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _read(args: tuple, kwargs: dict) -> tuple[Any, dict]:
    """Return the hidden states and the other keyword arguments that a module is called with."""
    others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
    return args[0] if args else kwargs["hidden_states"], others
