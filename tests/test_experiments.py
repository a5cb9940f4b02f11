"""The experiments of a profile: what each of the two methods drops, in which order, and what is measured of it."""

import pytest
import tiny

from spd_calib.formats.drops import Drops, Point, Strategy
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.sensitivity.measure import Subject, measure
from spd_calib.sensitivity.profile import experiments, profile

KEEP, DROP, PLAIN = Strategy.KEEP_SYNC, Strategy.BLOCK_DROP, Strategy.PLAIN_DROP
BOTH = ("attention", "mlp")


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject(TensorParallelLM.simulated(tiny.build("llama"), 2))


SEQUENCES = tiny.tokens(4, 16).tolist()


def test_cumulative_goes_from_the_last_block_backwards():
    def blocks(method):
        return [(e.point.block, e.drops.blocks("attention")) for e in experiments(method, [DROP], num_blocks=3)]

    assert blocks("cumulative") == [(2, [2]), (1, [1, 2]), (0, [0, 1, 2])]
    assert blocks("single") == [(0, [0]), (1, [1]), (2, [2])]


def test_the_mlp_sync_point_is_deferred_in_every_block_but_the_last():
    both = list(experiments("single", [DROP, PLAIN], num_blocks=3, sync_points=BOTH))
    assert [(e.point.block, e.strategy) for e in both if e.point.sync_point == "mlp"] == [(0, DROP), (1, DROP)]
    alone = experiments("single", [DROP], num_blocks=3, sync_points=["mlp"])
    assert len(both) == 8 and {e.point.sync_point for e in alone} == {"mlp"}


def test_what_is_dropped_always_is_not_tried():
    always = Drops.of({Point(1, "attention"): DROP, Point(0, "mlp"): DROP})
    left = [e.point for e in experiments("single", [DROP], num_blocks=3, sync_points=BOTH, always=always)]
    assert left == [Point(0, "attention"), Point(2, "attention"), Point(1, "mlp")]


def test_an_mlp_measurement_is_of_the_mlp(subject):
    tried = list(experiments("single", [DROP], num_blocks=4, sync_points=BOTH))
    _, rows, alone = profile(subject, SEQUENCES, rows=tried, batch_size=4)
    assert [(r.block, r.sync_point, r.dropped) for r in rows[4:]] == [(b, "mlp", [b]) for b in (0, 1, 2)]
    deferred = Drops.of_blocks((KEEP,) * 4, (KEEP, DROP, KEEP, KEEP))
    assert rows[5].kl == measure(subject, SEQUENCES, plans=[deferred])[1][0].kl
    assert alone is None


def test_cumulative_measures_the_whole_set(subject):
    tried = list(experiments("cumulative", [DROP], num_blocks=4))
    _, rows, _ = profile(subject, SEQUENCES, rows=tried, batch_size=4)
    together = Drops.of({Point(b, "attention"): DROP for b in (1, 2, 3)})
    together = measure(subject, SEQUENCES, plans=[together])[1][0]
    (row,) = [r for r in rows if r.block == 1]
    assert row.dropped == [1, 2, 3]
    assert row.kl == together.kl and row.nll_increase == together.nll_increase


def test_each_row_is_reported_after_every_batch(subject):
    seen = []
    tried = list(experiments("single", [DROP], num_blocks=4))[:2]
    profile(subject, SEQUENCES, rows=tried, batch_size=2, tick=lambda i, tally: seen.append((i, len(tally.tokens))))
    assert seen == [(0, 2), (1, 2), (0, 4), (1, 4)]


def test_tasks_are_scored_while_the_model_runs_the_row(subject):
    """Of the dense model first; the loss is the dense model's accuracy less the row's."""
    ran, seen = [], []

    def tick(i, tally):
        seen.append((i, tally))

    def accuracy():
        ran.append(subject.lm.record(tiny.tokens(1, 4)).drops)
        return {"t": 1 - 0.25 * len(ran)}

    tried = list(experiments("single", [PLAIN], num_blocks=4))[1:3]
    baseline, rows, _ = profile(
        subject,
        SEQUENCES,
        rows=tried,
        batch_size=4,
        task_accuracy=accuracy,
        tick=lambda i, tally: seen.append((i, tally)),
    )
    assert ran == [Drops(), tried[0].drops, tried[1].drops]
    assert baseline.task_accuracy == {"t": 0.75}
    assert [r.task_accuracy_drop for r in rows] == [{"t": 0.25}, {"t": 0.5}]
    assert seen[2:] == [(0, None), (1, None)]


def test_of_a_model_made_from_another_its_own_cost_is_the_third_value():
    lm = TensorParallelLM.simulated(tiny.build("llama"), 2)
    original = TensorParallelLM.simulated(tiny.build("llama", seed=1), 2)
    subject = Subject(lm, Drops.of({Point(1, "attention"): DROP}), original)
    tried = list(experiments("single", [DROP], num_blocks=4, always=subject.always))
    ticks = []
    _, rows, alone = profile(subject, SEQUENCES, rows=tried, batch_size=4, tick=lambda i, tally: ticks.append(i))
    assert alone == measure(subject, SEQUENCES, plans=[Drops()])[1][0]
    assert [r.block for r in rows] == [0, 2, 3] and ticks == [0, 1, 2]
