"""Treated blocks whose weights lie on disk, of which one block's at a time are in memory."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from spd_calib.models.stream_load import no_memory

from .student import Student


class ParkedStudents:
    """The students of a model that is read from disk, once what they are is written down.

    Their matrices are read whenever the block is to run; norms and biases stay, as of the dense blocks (stream_load).
    """

    def __init__(self) -> None:
        self._held: Student | None = None
        self._rounded: torch.dtype | None = None

    def park(self, student: Student, read: Callable[[], Mapping[str, Tensor]]) -> None:
        """Let go of a student's matrices; `read` returns its state (Student.state) for the time when it is to run."""
        self._let_go(student)
        student.block.read_weights = lambda _: self._hold(student, read)

    def round_to(self, dtype: torch.dtype) -> None:
        """Round whatever is read from now on to `dtype`; the weights are then used in the dtype they have."""
        self._rounded = dtype
        if self._held is not None:
            self._let_go(self._held)
            self._held = None

    def _hold(self, student: Student, read: Callable[[], Mapping[str, Tensor]]) -> None:
        if self._held is student:
            return
        if self._held is not None:
            self._let_go(self._held)
        self._held = None
        state = read()
        for name, p in student.layer.named_parameters():
            if p.dim() > 1:
                weight = state[f"layer.{name}"]
                weight = weight if self._rounded is None else weight.to(self._rounded)
                p.data = weight.to(p, copy=True)  # a product rounds by where in memory a matrix begins
        self._held = student

    def _let_go(self, student: Student) -> None:
        for p in student.layer.parameters():
            if p.dim() > 1:
                p.data = no_memory(p.shape, p)
