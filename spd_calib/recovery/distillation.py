"""Training what the plan changed until it gives what the dense model gave.

Block by block: the student block (its own weights, and the predictors) learns the dense block's output by mean
squared error, from the dense block's input or from the planned model's own. Then, shortly, all treated blocks
together on KL(dense || planned). AdamW, linear warm-up, cosine decay, early stop on text kept from training. What is
held: one block (or, at the end, the treated ones), its optimizer's state, and the feed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spd_calib.parallel.comm import Comm

from .planned import Batch, Feed, Student

Save = Callable[[dict[str, Tensor]], None]
Loss = Callable[[Batch], Tensor]  # [2]: the sum over this replica's tokens, and their number
Tick = Callable[[str], None]


@dataclass(frozen=True)
class Schedule:
    steps: int = 200
    rate: float = 0.01  # of AdamW, relative to each tensor's root mean square: the same for any width
    warm_up: float = 0.1  # share of the steps
    weight_decay: float = 0.0
    check_every: int = 25  # steps between looks at the text kept from training, and between checkpoints
    patience: int = 4  # looks without progress before it stops
    seed: int = 0

    def at(self, step: int) -> float:
        """Factor on the rate: linear up, half a cosine down to a twentieth."""
        up = max(1, round(self.warm_up * self.steps))
        if step < up:
            return (step + 1) / up
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - up) / max(1, self.steps - up)))


@dataclass(frozen=True)
class Outcome:
    """Errors on the text kept from training, before and after (of the best step, which the student is left at)."""

    before: float
    after: float
    steps: int


def distil_block(
    student: Student, feed: Feed, train: Sequence[Batch], kept: Sequence[Batch], own: bool, schedule: Schedule,
    saved: dict[str, Tensor] | None = None, save: Save | None = None, tick: Tick = lambda note: None,
) -> Outcome:  # fmt: skip
    """Train `student` (the feed's present block). `saved` and `save`: where an interrupted run goes on."""
    index = student.block.index
    with torch.no_grad():
        targets = {id(b): feed.dense_output(b) for b in (*train, *kept)}
        added = [_total((targets[id(b)] - b.dense)[b.mask].square().sum(-1)) for b in kept]
        size, tokens = feed.replicas.all_reduce([sum(added, torch.zeros(2, device=added[0].device))]).tolist()
        scale = tokens / max(size, 1e-30)  # the error is a share of what the block adds

    def loss(batch: Batch) -> Tensor:
        y = student.block(feed.inputs(batch, own), **batch.kwargs[index])
        whole = y.shared if y.debt is None else y.shared + sum(y.debt)  # a deferred MLP is settled later, in full
        difference = (whole - targets[id(batch)])[batch.mask]
        return _total(difference.square().sum(-1) * scale)

    return _train([student], feed.replicas, loss, train, kept, schedule, saved, save, tick)


def distil_whole(
    feed: Feed, students: Sequence[Student], train: Sequence[Batch], kept: Sequence[Batch], schedule: Schedule,
    saved: dict[str, Tensor] | None = None, save: Save | None = None, tick: Tick = lambda note: None,
) -> Outcome:  # fmt: skip
    """Train `students`, which stand in the plan, together on the KL of the whole plan.

    The batches are of `feed`, which has not moved yet.
    """
    model = feed.model

    def loss(batch: Batch) -> Tensor:
        s = batch.planned
        for block, kwargs in zip(model.blocks, batch.kwargs, strict=True):
            s = block(s, **kwargs)
        with torch.no_grad():
            log_p = model.lm.head(batch.final)[batch.mask].float().log_softmax(-1)
        log_q = model.logits(model.lm.final_norm(s))[batch.mask].float().log_softmax(-1)
        return _total((log_p.exp() * (log_p - log_q)).sum(-1))

    return _train(students, feed.replicas, loss, train, kept, schedule, saved, save, tick)


def _train(
    students: Sequence[Student], replicas: Comm, loss: Loss, train: Sequence[Batch], kept: Sequence[Batch],
    schedule: Schedule, saved: dict[str, Tensor] | None, save: Save | None, tick: Tick,
) -> Outcome:  # fmt: skip
    parameters = [p for s in students for p in trainable(s)]
    groups = [
        {"params": [p], "base": schedule.rate * max(p.detach().square().mean().sqrt().item(), 0.01)} for p in parameters
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=schedule.weight_decay)
    with torch.enable_grad():
        error = _error(replicas, loss, kept)
        before, best, best_at, first = error, error, 0.0, 0.0
        best_values = [p.detach().clone() for p in parameters]
        if saved is not None:
            before, best, best_at, first = (float(v) for v in saved["progress"])
            best_values = [saved[f"best.{i}"].to(p) for i, p in enumerate(parameters)]
            _restore(saved, parameters, optimizer)
        for p in parameters:
            p.requires_grad_(True)
        step = int(first)
        while step < schedule.steps and step - best_at < schedule.patience * schedule.check_every:
            for group in optimizer.param_groups:
                group["lr"] = group["base"] * schedule.at(step)
            optimizer.zero_grad(set_to_none=True)
            value, tokens = loss(train[_pick(step, len(train), schedule.seed)])
            (value / replicas.all_reduce([tokens.detach()])).backward()
            for p in parameters:
                p.grad = replicas.all_reduce([torch.zeros_like(p) if p.grad is None else p.grad])
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            step += 1
            if step % schedule.check_every == 0 or step == schedule.steps:
                error = _error(replicas, loss, kept)
                if error < best:
                    best, best_at, best_values = error, step, [p.detach().clone() for p in parameters]
                tick(f"step {step}: error {error:.4f}, at best {best:.4f}")
                if save is not None:
                    save(_state((before, best, best_at, step), parameters, best_values, optimizer))
    with torch.no_grad():
        for p, value in zip(parameters, best_values, strict=True):
            p.requires_grad_(False).copy_(value)
            p.grad = None
    return Outcome(before, best, step)


def trainable(student: Student) -> list[nn.Parameter]:
    """The block's weights (each once) and its predictors."""
    predictors = [] if student.block.compensation is None else list(student.block.compensation.parameters())
    return [*student.layer.parameters(), *predictors]


def _total(of_tokens: Tensor) -> Tensor:
    return torch.stack([of_tokens.sum(), torch.tensor(float(len(of_tokens)), device=of_tokens.device)])


@torch.no_grad()
def _error(replicas: Comm, loss: Loss, kept: Sequence[Batch]) -> float:
    sums, tokens = replicas.all_reduce([torch.stack([loss(b) for b in kept])]).unbind(1)
    return (sums / tokens).mean().item()


def _pick(step: int, n: int, seed: int) -> int:
    """The batch of a step: all once, in an order of its own every epoch. Depends on nothing but the step."""
    generator = torch.Generator().manual_seed(seed * 100_003 + step // n)
    return int(torch.randperm(n, generator=generator)[step % n])


def _state(
    progress: tuple, parameters: list, best: list[Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    tensors = {"progress": torch.tensor(progress, dtype=torch.float64)}
    for i, (p, b) in enumerate(zip(parameters, best, strict=True)):
        tensors |= {
            f"now.{i}": p.detach(),
            f"best.{i}": b,
            f"base.{i}": torch.tensor(optimizer.param_groups[i]["base"], dtype=torch.float64),
        }
        tensors |= {f"{name}.{i}": value for name, value in optimizer.state[p].items()}
    return {name: t.cpu().contiguous() for name, t in tensors.items()}


def _restore(saved: dict[str, Tensor], parameters: list, optimizer: torch.optim.Optimizer) -> None:
    for i, p in enumerate(parameters):
        with torch.no_grad():
            p.copy_(saved[f"now.{i}"])
        optimizer.param_groups[i]["base"] = float(saved[f"base.{i}"])
        optimizer.state[p] = {
            "step": saved[f"step.{i}"].clone(),
            "exp_avg": saved[f"exp_avg.{i}"].to(p),
            "exp_avg_sq": saved[f"exp_avg_sq.{i}"].to(p),
        }
