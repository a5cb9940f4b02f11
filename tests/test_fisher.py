"""Fisher's predictions against logits differentiated token by token, and against what the loop measures."""

import itertools

import pytest
import tiny
import torch

from spd_calib.formats.common import Strategy
from spd_calib.formats.profile import Point
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.parallel.streams import Streams
from spd_calib.sensitivity.fisher import fisher, fisher_terms, interactions
from spd_calib.sensitivity.measure import Experiment, batches, measure

KEEP, DROP = Strategy.KEEP_SYNC, Strategy.BLOCK_DROP
BOTH = ["attention", "mlp"]
SEQUENCES = [tiny.tokens(1, n, seed=n)[0].tolist() for n in (12, 9, 16, 12)]


def experiment(points, num_blocks=4) -> Experiment:
    attention, mlp = [KEEP] * num_blocks, [KEEP] * num_blocks
    for p in points:
        (attention if p.sync_point == "attention" else mlp)[p.block] = DROP
    return Experiment(tuple(attention), tuple(mlp))


def change_of(lm, recording, points, block) -> tuple[torch.Tensor, torch.Tensor]:
    """The stream behind `block` as the dense model has it, and with `points` dropped."""
    first, found = min(p.block for p in points), []
    for e in (experiment([]), experiment(points)):
        lm.set_strategies(e.attention, e.mlp)
        s = recording.streams[first]
        for i in range(first, block + 1):
            s = lm.blocks[i](s, **recording.kwargs[i])
        found.append(s.shared)
    lm.keep_all()
    return found[0], found[1]


def logits_from(lm, recording, block, stream):
    s = Streams(stream)
    for i in range(block + 1, lm.num_blocks):
        s = lm.blocks[i](s, **recording.kwargs[i])
    return lm.head(lm.final_norm(s))


def exact(lm, sequences, changes) -> torch.Tensor:
    """1/2 dz_i' F dz_j per token, dz by forward-mode differentiation; `changes`: (points, last block run) a term."""
    total, tokens = 0.0, 0
    for ids, lengths in batches(sequences, 1, lm.device):
        with torch.no_grad():
            recording = lm.record(ids)
            p = lm.logits(recording.final)[0, :-1].softmax(-1).double()
            dz = []
            for points, block in changes:
                dense, dropped = change_of(lm, recording, points, block)
                epsilon = 1e-3
                ends = [logits_from(lm, recording, block, dense + e * (dropped - dense)) for e in (epsilon, -epsilon)]
                dz.append(((ends[0] - ends[1]) / (2 * epsilon))[0, :-1].double())
        z = torch.stack(dz)
        mean = torch.einsum("tv,itv->it", p, z)
        total = total + torch.einsum("tv,itv,jtv->ij", p, z, z) - torch.einsum("it,jt->ij", mean, mean)
        tokens += lengths[0] - 1
    return total / (2 * tokens)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_attention_matrix_is_the_fisher_form_of_the_logits_changes(family):
    lm = TensorParallelLM.simulated(tiny.build(family), 4)
    _, found = fisher(lm, SEQUENCES, ["attention"], 0.05, batch_size=3)
    assert found.sampling_error <= 0.05
    expected = exact(lm, SEQUENCES, [([Point(block=i, sync_point="attention")], i) for i in range(4)])
    size = expected.diag().sqrt()
    for i, j in itertools.combinations_with_replacement(range(4), 2):
        assert found.matrix[i][j - i] == pytest.approx(expected[i, j].item(), abs=0.15 * float(size[i] * size[j]))
