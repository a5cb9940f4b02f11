"""What a rank's MLP reads in place of its own partial sum: a prediction of the whole attention output.

The predictor sees the rank's own head outputs z alone, so it needs no sync. Three forms, with `partial` the rank's
own partial sum (o_proj's bias left out of it, and of the prediction):

    mean      partial + bias              free: a bias
    low_rank  partial + bias + (z A) B    k * (d_rank + d) more weights
    full      z W + bias                  d_rank * d more weights, one matrix product with o_proj's slice

The residual stream still gets the exact partial sums; only what the MLP reads is predicted.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from spd_calib.errors import InputError
from spd_calib.formats.files import sha256_of
from spd_calib.formats.plan import Plan

Kind = Literal["mean", "low_rank", "full"]


class Compensation(nn.Module):
    """One rank's predictor in one block. bias [d]; low_rank: a [d_rank, k], b [k, d]; full: w [d_rank, d]."""

    bias: Tensor
    a: Tensor | None
    b: Tensor | None
    w: Tensor | None

    def __init__(self, bias: Tensor, a: Tensor | None = None, b: Tensor | None = None, w: Tensor | None = None):
        super().__init__()
        for name, tensor in (("bias", bias), ("a", a), ("b", b), ("w", w)):
            setattr(self, name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))

    @property
    def kind(self) -> Kind:
        return "full" if self.w is not None else "low_rank" if self.a is not None else "mean"

    @property
    def rank(self) -> int:
        return self.a.shape[1] if self.a is not None else 0

    def forward(self, z: Tensor, partial: Tensor) -> Tensor:
        """z: [B, T, d_rank], what enters the rank's slice of o_proj; partial: [B, T, d]. Returns the predicted sum."""
        if self.w is not None:
            return z @ self.w + self.bias
        predicted = partial + self.bias
        return predicted if self.a is None or self.b is None else predicted + z @ self.a @ self.b


def tensor_name(block: int, rank: int, part: str) -> str:
    """Name of a tensor in the file beside the plan; part: bias, a, b or w."""
    return f"blocks.{block}.ranks.{rank}.{part}"


def shapes(kind: Kind, k: int, d_rank: int, d: int) -> dict[str, tuple[int, ...]]:
    """The tensors of one rank's predictor."""
    forms: dict[str, dict[str, tuple[int, ...]]] = {
        "mean": {"bias": (d,)},
        "low_rank": {"bias": (d,), "a": (d_rank, k), "b": (k, d)},
        "full": {"bias": (d,), "w": (d_rank, d)},
    }
    return forms[kind]


def load_compensation(
    plan: Plan, plan_path: Path, ranks: Iterable[int] | None = None
) -> dict[int, dict[int, Compensation]]:
    """The predictors a plan names, by block and rank; empty where it names none. Of `ranks` alone, where given: the
    tensors of the others are not read.

    Raises InputError where the file beside the plan is missing, lies elsewhere, is not the one the plan was written
    with, or holds other tensors than the plan says.
    """
    if plan.compensation is None:
        return {}
    path = plan_path.parent / plan.compensation.file
    if not path.is_file():
        raise InputError(f"{plan_path} needs {path.name} beside it, and it is not there; copy both files together.")
    if path.resolve().parent not in (plan_path.parent.resolve(), plan_path.resolve().parent):
        # the hub's cache links both files to one folder; a link to anywhere else is not followed
        raise InputError(f"{path} is a link that leaves the folder of {plan_path}; copy the file itself there.")
    try:
        if sha256_of(path) != plan.compensation.sha256:
            raise InputError(f"{path} is not the file {plan_path} was written with; run `spd-calib recover` again.")
        with safe_open(path, framework="pt") as file:
            wanted = set(ranks) if ranks is not None else set(range(plan.tensor_parallel.size))
            return _read(plan, plan_path, path, file, wanted)
    except (SafetensorError, OSError):
        raise InputError(f"{path} is not a whole safetensors file; run `spd-calib recover` again.") from None


def _read(plan: Plan, plan_path: Path, path: Path, file: Any, ranks: set[int]) -> dict[int, dict[int, Compensation]]:
    """What the open safetensors file holds for `ranks`; every name in it must be one of the plan's."""
    names = set(file.keys())
    found: dict[int, dict[int, Compensation]] = {}
    for block in plan.blocks:
        if (form := block.compensation) is None:
            continue
        found[block.index] = {}
        for rank in range(plan.tensor_parallel.size):
            named = {p: tensor_name(block.index, rank, p) for p in shapes(form.kind, 1, 1, 1)}
            if rank not in ranks:
                names -= set(named.values())
                continue
            parts = {p: file.get_tensor(n) if n in names else None for p, n in named.items()}
            names -= set(named.values())
            d, d_rank = (len(b) if (b := parts["bias"]) is not None and b.dim() == 1 else 0), 0
            for inner in (parts.get("a"), parts.get("w")):
                d_rank = inner.shape[0] if inner is not None else d_rank
            expected = shapes(form.kind, form.rank, d_rank, d)
            for part, tensor in parts.items():
                if tensor is None or tensor.shape != expected[part] or not tensor.isfinite().all():
                    raise InputError(
                        f"{path}: {tensor_name(block.index, rank, part)} is missing or not what it should be."
                    )
            found[block.index][rank] = Compensation(**parts)  # type: ignore[arg-type]
    if names:
        raise InputError(f"{path} holds {min(names)}, which {plan_path} does not name.")
    return found


def check_shapes(block: int, predictors: Mapping[int, Compensation], d_rank: int, d: int) -> None:
    """Raises InputError unless every predictor (by rank) reads d_rank head outputs and gives d values."""
    for rank, c in predictors.items():
        if {p: tuple(t.shape) for p, t in c.named_parameters()} != shapes(c.kind, c.rank, d_rank, d):
            raise InputError(
                f"The compensation of block {block}, rank {rank}, does not fit the model's heads and width."
            )


def tensors_of(block: int, predictors: Mapping[int, Compensation]) -> dict[str, Tensor]:
    """One block's predictors (by rank) as they are written beside the plan."""
    return {
        tensor_name(block, rank, part): tensor.detach().to("cpu", torch.float32).contiguous()
        for rank, c in predictors.items()
        for part, tensor in c.named_parameters()
    }
