"""Deciding which rank gets which neurons of each expert. The dense function stays the same.

As in neuron_grouping.py a neuron costs E[(w (act_n(u_r) - act_n(u)))^2] |down_n|^2 on rank r, over the tokens that its
expert is chosen for, w the router's weight; every expert's assignment is the balanced one of least cost.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from spd_calib.models.experts import expert_neurons
from spd_calib.models.parts import ExpertParts
from spd_calib.parallel.streams import keep

from .assignment import balanced, order_of
from .feed import Batch, Feed
from .reads import mlp_reads
from .student import Student


@torch.no_grad()
def group_expert_neurons(student: Student, feed: Feed, batches: Iterable[Batch]) -> None:
    """Reorder the neurons of each of the student's experts: each rank gets those it distorts least."""
    mixture, ranks = student.parts.experts, student.block.comm.size
    assert mixture is not None
    if ranks == 1:
        return
    for expert, cost in enumerate(_costs(student, mixture, feed, batches)):  # [R, f]
        down, gate_up = mixture.weight("down_proj", expert), mixture.weight("gate_up_proj", expert)
        cost = cost * down.double().square().sum(0)
        order = torch.from_numpy(order_of(balanced(cost.cpu().numpy()), ranks)).to(down.device)
        down.copy_(down[:, order])
        for tensor in (gate_up, mixture.bias("gate_up_proj", expert)):
            if tensor is not None and mixture.interleaved:
                pairs = tensor.unflatten(0, (-1, 2))
                pairs.copy_(pairs[order])
            elif tensor is not None:
                halves = tensor.unflatten(0, (2, -1))
                halves.copy_(halves[:, order])


def _costs(student: Student, mixture: ExpertParts, feed: Feed, batches: Iterable[Batch]) -> Tensor:
    """Return the sum over tokens of each neuron's squared error on each rank, [E, R, f], float64."""
    block, experts = student.block, mixture.experts.get_parameter("gate_up_proj")
    total = experts.new_zeros(len(experts), block.comm.size, mixture.neurons, dtype=torch.float64)
    drop = student.drops.at(block.attention_point)
    for batch in batches:
        s = feed.inputs(batch)
        partials, heads = block.attend(s, **feed.kwargs(batch))
        whole, partly = (
            keep(s, partials, block.attention_branch, block.comm).shared,
            mlp_reads(student, s, partials, heads, **feed.kwargs(batch)),
        )
        routing = block.route(partly.shared, block.expected(drop, s))
        real = batch.mask.flatten()
        u = block.norm2(whole).flatten(0, 1)
        of_ranks = [block.norm2(partly.read(rank)).flatten(0, 1) for rank in range(block.comm.size)]
        for expert in routing.chosen[real].unique().tolist():
            token, place = torch.where((routing.chosen == expert) & real[:, None])
            weight, right = routing.weights[token, place, None], expert_neurons(mixture, expert, u[token])
            for rank, u_r in enumerate(of_ranks):
                error = weight * (expert_neurons(mixture, expert, u_r[token]) - right)
                total[expert, rank] += error.double().square().sum(0)
    return total
