"""Training what the plan changed until it gives what the dense model gave.

Block by block: the student block (its own weights, and the predictors) learns the dense block's output, from the dense
block's input or from the planned model's own; an error counts by what it costs in KL (error_cost.py). Then, shortly,
all treated blocks together on KL(dense || planned). Routers of experts learn the dense model's choice besides
(routing_error.py). AdamW, linear warm-up, cosine decay, early stop on the text to choose by. What is held: one block
(or, at the end, the treated ones), its optimizer's state, and the feed. Of the logits LOGITS numbers are held at once;
with a very large vocabulary each step learns from some positions of its batch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spd_calib.models.experts import Routing
from spd_calib.parallel.comm import Comm
from spd_calib.parallel.head import VocabParallelHead
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.parallel.routing import telling_routers
from spd_calib.parallel.streams import in_full

from .error_cost import ErrorCost, costs_of_errors
from .feed import Batch, Feed, with_starts
from .routing_error import routed_in_dense_block, routed_in_dense_model, routing_error
from .student import Student

LOGITS = 2**23  # float32, 32 MiB a tensor
LEARNED = 2**27  # logits that a step learns from at most
HARM = 1.1  # of the error before training: a little more may come of a rate that wins most in the end
LOWER = 0.25  # of the rate, where it did harm
LOOKED_AT = 4  # batches of the text to choose by, at each look: of many more, looks would cost as much as the steps
# [2]: the sum over this replica's tokens, and their number; of those that a step learns from, or, for None, of all
Loss = Callable[[Batch, int | None], Tensor]
State = dict[str, Tensor]


@dataclass(frozen=True)
class Schedule:
    """The length, the learning rates and the precision of a training.

    With `mixed` a step's matrix products are bfloat16; weights, gradients, the residual stream, the loss, and the
    vocabulary wherever an error is measured, stay what they are.
    """

    steps: int = 200
    rate: float = 0.01  # of AdamW, relative to each tensor's root mean square: the same for any width
    warm_up: float = 0.1  # share of the steps
    weight_decay: float = 0.0
    check_every: int = 25  # steps between looks at the text to choose by, and between saved states
    patience: float = 0.5  # share of the steps without progress before it stops: much is won as the rate falls
    seed: int = 0
    mixed: bool = False

    def at(self, step: int) -> float:
        """Return the factor on the rate at a step: linear up, then half a cosine down to a twentieth."""
        up = max(1, round(self.warm_up * self.steps))
        if step < up:
            return (step + 1) / up
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - up) / max(1, self.steps - up)))


@dataclass(frozen=True)
class Outcome:
    """The errors on the text to choose by, before training and at the best step, whose weights the student keeps."""

    before: float
    after: float
    steps: int

    def detail(self) -> dict:
        """Return what the report says of it."""
        return {"error_before": self.before, "error_after": self.after, "steps": self.steps}


@dataclass(frozen=True)
class TrainingHooks:
    """Callbacks of a training, and where it goes on from; each may be left out.

    `save` is given its state now and then, and `saved` is such a state of an interrupted training, from which it goes
    on. `tick` is given a note whenever the error on the text to choose by was measured.
    """

    saved: State | None = None
    save: Callable[[State], None] | None = None
    tick: Callable[[str], None] | None = None


def distil_block(
    student: Student,
    feed: Feed,
    *,
    cost: ErrorCost | None = None,
    schedule: Schedule,
    hooks: TrainingHooks = TrainingHooks(),
) -> Outcome:
    """Train a student of the feed's present block on what the dense block gives; `cost` is that of errors there."""

    def cost_of(batch: Batch, y: Tensor) -> Tensor:
        target = feed.dense_output(batch)
        return costs_of_errors(cost, (y - target)[batch.mask], target, batch)

    with torch.no_grad():
        added = [_total(cost_of(b, b.dense), b.weight) for b in with_starts(feed.choosing)]
        size, tokens = feed.replicas.all_reduce([torch.stack(added).sum(0)]).tolist()
        scale = tokens / max(size, 1e-30)  # the error is a share of what the block adds

    def loss_of(batch: Batch) -> Tensor:
        routed: dict[int, Routing] = {}
        with telling_routers([student.block], routed.__setitem__), _products(schedule, feed.model.lm.device):
            y = student.run(feed.inputs(batch), **feed.kwargs(batch))
        of_routers = routing_error(routed_in_dense_block(feed, batch), routed, batch.mask)[batch.mask]
        error = cost_of(batch, in_full(y)) * scale  # a deferred MLP is settled later
        return _total(error + batch.weight * of_routers, batch.weight)

    def loss(batch: Batch, _: int | None) -> Tensor:
        return torch.stack([loss_of(b) for b in with_starts([batch])]).sum(0)

    return _train([student], feed, loss=loss, schedule=schedule, hooks=hooks)


def distil_together(
    students: Sequence[Student], feed: Feed, *, schedule: Schedule, hooks: TrainingHooks = TrainingHooks()
) -> Outcome:
    """Train students that stand in the planned model together, on the KL of the whole and the error of their routers.

    The feed must not have moved yet.
    """
    model = feed.model
    exact = model.lm.head
    head = exact.of_dtype(torch.bfloat16) if schedule.mixed else exact

    def loss(batch: Batch, step: int | None) -> Tensor:
        s, routed = batch.planned, dict[int, Routing]()
        blocks = [student.block for student in students]
        with telling_routers(blocks, routed.__setitem__), _products(schedule, model.lm.device):
            for index, kwargs in enumerate(batch.kwargs):
                s = model.run_block(index, s, **kwargs)
        dense = routed_in_dense_model(feed, batch, last=max(routed, default=-1))
        final = model.lm.final_norm(s)
        pieces = _positions(batch.mask, model.lm.head.vocab_size, step, replicas=feed.replicas.size)
        seen = torch.cat(list(pieces))
        of_routers = _total(routing_error(dense, routed, batch.mask)[:, seen][batch.mask[:, seen]])
        of_dense = feed.dense_final(batch)
        kl = _divergence(model.lm, exact if step is None else head, of_dense, final, mask=batch.mask, pieces=pieces)
        return of_routers + torch.stack([kl, torch.zeros_like(kl)])

    return _train(students, feed, loss=loss, schedule=schedule, hooks=hooks)


@dataclass
class _Progress:
    """The state of a training at its last look: the errors before it and at its best, the step of that, steps made.

    `factor` is what the rate has been lowered to, as a share.
    """

    before: float
    best: float
    best_at: float = 0.0
    step: float = 0.0
    factor: float = 1.0


def _train(students: Sequence[Student], feed: Feed, *, loss: Loss, schedule: Schedule, hooks: TrainingHooks) -> Outcome:
    """Train until the schedule ends or nothing improves, and leave the students at the best step.

    Where a look finds HARM times the error before the training, the rate was too high: it goes on from the best step
    with less of it.
    """
    replicas, batches, looked_at = feed.replicas, feed.fitting, feed.choosing[:LOOKED_AT]
    parameters = [p for s in students for p in s.trainable()]
    optimizer = _optimizer(parameters, schedule)
    with torch.enable_grad():
        best_values = [p.detach().clone() for p in parameters]
        if hooks.saved is None:
            error = _error(replicas, loss, looked_at)
            progress = _Progress(error, error)
        else:
            progress = _Progress(*(float(v) for v in hooks.saved["progress"]))
            best_values = [hooks.saved[f"best.{i}"].to(p) for i, p in enumerate(parameters)]
            _restore(hooks.saved, parameters, optimizer)
        for p in parameters:
            p.requires_grad_(True)
        step = int(progress.step)
        while step < schedule.steps and progress.step - progress.best_at < schedule.patience * schedule.steps:
            for group in optimizer.param_groups:
                group["lr"] = group["base"] * schedule.at(step) * progress.factor
            batch = batches[_pick(step, len(batches), schedule.seed)]
            _descend(parameters, loss(batch, step), optimizer, replicas=replicas)
            step += 1
            if step % schedule.check_every and step != schedule.steps:
                continue
            error = _error(replicas, loss, looked_at)
            if error < progress.best:
                progress.best, progress.best_at = error, step
                best_values = [p.detach().clone() for p in parameters]
            elif not error <= HARM * progress.before:  # nor is it a number
                progress.factor *= LOWER
                _set(parameters, best_values)
                optimizer.state.clear()  # it knows of the way from there alone
            progress.step = step
            if hooks.tick is not None:
                lowered = "" if progress.factor == 1 else f", rate times {progress.factor:.3g}"
                hooks.tick(f"step {step}: error {error:.4f}, at best {progress.best:.4f}{lowered}")
            if hooks.save is not None:
                hooks.save(_state(progress, parameters, best_values, optimizer))
    _set(parameters, best_values)
    for p in parameters:
        p.requires_grad_(False).grad = None
    return Outcome(progress.before, progress.best, step)


def _optimizer(parameters: Sequence[nn.Parameter], schedule: Schedule) -> torch.optim.AdamW:
    """Return AdamW with a group for each parameter, whose `base` rate is relative to the parameter's size."""
    groups = [
        {"params": [p], "base": schedule.rate * max(p.detach().square().mean().sqrt().item(), 0.01)} for p in parameters
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=schedule.weight_decay)


def _descend(
    parameters: Sequence[nn.Parameter], loss: Tensor, optimizer: torch.optim.Optimizer, *, replicas: Comm
) -> None:
    """Make one step down the mean of `loss` over all replicas' tokens."""
    optimizer.zero_grad(set_to_none=True)
    value, tokens = loss
    (value / replicas.all_reduce([tokens.detach()])).backward()
    for p in parameters:
        p.grad = replicas.all_reduce([torch.zeros_like(p) if p.grad is None else p.grad])
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def _products(schedule: Schedule, device: torch.device) -> torch.autocast:
    """Return the context in which the matrix products are those of the schedule's precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=schedule.mixed)


def _divergence(
    lm: TensorParallelLM,
    head: VocabParallelHead,
    of_dense: Tensor,
    final: Tensor,
    *,
    mask: Tensor,
    pieces: Sequence[Tensor],
) -> Tensor:
    """Return the sum of KL(dense || planned) over a batch's real tokens, `mask` [B, T], at the positions of `pieces`.

    `head` is the model's, in any dtype; `of_dense` and `final` leave the final norms, [B, T, d]. The gradient of a
    piece is taken at once, so that the logits of one piece alone are held, and none are computed anew on the way back.
    """

    def log_probabilities(final: Tensor, at: Tensor) -> Tensor:
        logits = lm.scaled_logits(head(final[:, at].to(head.weight.dtype)))
        return logits[mask[:, at]].float().log_softmax(-1)

    leaf, total = final.detach(), torch.zeros((), device=final.device)
    leaf.requires_grad_(final.requires_grad)
    for at in pieces:
        with torch.no_grad():
            log_p = log_probabilities(of_dense, at)
        log_q = log_probabilities(leaf, at)
        kl = nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
        if kl.requires_grad:
            kl.backward()
        total = total + kl.detach()
    if leaf.grad is None:
        return total
    through = (final * leaf.grad).sum()
    return total + through - through.detach()


def _total(of_tokens: Tensor, weight: float = 1.0) -> Tensor:
    """Return the sum of the tokens' losses, and their number, each counted as `weight`, [2]."""
    return torch.stack([of_tokens.sum(), torch.tensor(weight * len(of_tokens), device=of_tokens.device)])


@torch.no_grad()
def _error(replicas: Comm, loss: Loss, batches: Sequence[Batch]) -> float:
    """Return the mean, over batches, of the loss per token."""
    sums, tokens = replicas.all_reduce([torch.stack([loss(b, None) for b in batches])]).unbind(1)
    return (sums / tokens).mean().item()


def _positions(mask: Tensor, vocabulary: int, step: int | None, *, replicas: int = 1) -> Sequence[Tensor]:
    """Return the positions of a batch, mask [B, T], in pieces whose logits are at most LOGITS numbers each.

    Those of a step are drawn, others each time, and all replicas' logits are at most LEARNED numbers (one piece at
    least).
    """
    rows, length = mask.shape
    if step is None:
        order, most = torch.arange(length), length
    else:
        order = torch.randperm(length, generator=torch.Generator().manual_seed(step))
        most = max(1, LEARNED // (rows * replicas * vocabulary))
    return order[:most].to(mask.device).split(max(1, LOGITS // (rows * vocabulary)))


def _pick(step: int, n: int, seed: int) -> int:
    """Return the index of a step's batch: every epoch takes all n once, in another order. Depends on the step alone."""
    generator = torch.Generator().manual_seed(seed * 100_003 + step // n)
    return int(torch.randperm(n, generator=generator)[step % n])


def _state(
    progress: _Progress, parameters: Sequence[nn.Parameter], best: list[Tensor], optimizer: torch.optim.Optimizer
) -> State:
    """Return all that a training needs to go on, on the CPU."""
    so_far = (progress.before, progress.best, progress.best_at, progress.step, progress.factor)
    tensors = {"progress": torch.tensor(so_far, dtype=torch.float64)}
    for i, (p, b) in enumerate(zip(parameters, best, strict=True)):
        tensors |= {
            f"now.{i}": p.detach(),
            f"best.{i}": b,
            f"base.{i}": torch.tensor(optimizer.param_groups[i]["base"], dtype=torch.float64),
        }
        tensors |= {f"{name}.{i}": value for name, value in optimizer.state[p].items()}
    return {name: t.cpu().contiguous() for name, t in tensors.items()}


def _restore(saved: State, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Take back what `_state` returned."""
    for i, p in enumerate(parameters):
        with torch.no_grad():
            p.copy_(saved[f"now.{i}"])
        optimizer.param_groups[i]["base"] = float(saved[f"base.{i}"])
        if f"step.{i}" in saved:  # none where it had just gone back
            optimizer.state[p] = {
                "step": saved[f"step.{i}"].clone(),
                "exp_avg": saved[f"exp_avg.{i}"].to(p),
                "exp_avg_sq": saved[f"exp_avg_sq.{i}"].to(p),
            }


@torch.no_grad()
def _set(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    """Give the parameters these values."""
    for p, value in zip(parameters, values, strict=True):
        p.copy_(value)
