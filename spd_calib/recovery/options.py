"""The options of a recovery."""

from dataclasses import dataclass, field
from typing import Literal

from .distillation import Schedule

RecoveryMethod = Literal["grouping", "compensation", "refit", "distillation"]
METHODS: tuple[RecoveryMethod, ...] = ("grouping", "compensation", "refit", "distillation")
WITHOUT_TRAINING: tuple[RecoveryMethod, ...] = ("grouping", "compensation", "refit")
RefitPart = Literal["attention", "o", "mlp_in", "down"]
REFIT_PARTS: tuple[RefitPart, ...] = ("attention", "o", "mlp_in", "down")


@dataclass(frozen=True, kw_only=True)
class RecoveryOptions:
    """Names the methods that are tried, and bounds them.

    `max_rank` bounds the predictors: 0 allows the mean alone, a rank's number of head outputs the full one too. None
    allows all, but the mean alone where what the MLP reads is refitted, behind no norm: that wins as much, for nothing
    at run time. `exchange` is that of predictor_fit.choose. With `own_inputs` blocks are fitted and trained on the
    planned model's own streams, else on the dense model's. The schedules are those of training a block, and all treated
    blocks together.
    """

    methods: tuple[RecoveryMethod, ...] = WITHOUT_TRAINING
    refit_parts: tuple[RefitPart, ...] = REFIT_PARTS  # of those, where `refit` is a method
    max_rank: int | None = None
    exchange: float = 1.0
    own_inputs: bool = True
    block_schedule: Schedule = field(default_factory=Schedule)
    whole_schedule: Schedule = field(default_factory=Schedule)
    batch_size: int = 16
    seed: int = 0
