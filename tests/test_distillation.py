"""Training a block on the dense one: the error falls, a killed training goes on, replicas share the text."""

import copy
import math
from types import SimpleNamespace

import pytest
import tiny
import torch
from planned_models import planned, sequences

from spd_calib.models.predictor import Predictor
from spd_calib.recovery import distillation
from spd_calib.recovery.distillation import Schedule, TrainingHooks, distil_block, distil_together
from spd_calib.recovery.error_cost import ErrorCost
from spd_calib.recovery.feed import Batch, Feed
from spd_calib.recovery.held_out import HeldOut
from spd_calib.recovery.planned_model import PlannedModel
from spd_calib.recovery.routing_error import ROUTING
from spd_calib.recovery.student import Student


def test_distillation_lessens_the_error_and_goes_on_after_a_kill() -> None:
    schedule = Schedule(steps=20, check_every=10)
    model = planned("llama", tp=4, layers=1)
    feed = Feed(model, sequences(32), batch_size=4)
    through = model.students[0].copy()
    states: list[dict] = []
    keeping = TrainingHooks(save=lambda t: states.append(copy.deepcopy(t)))
    outcome = distil_block(through, feed, schedule=schedule, hooks=keeping)
    assert outcome.after < 0.9 * outcome.before and outcome.steps == 20
    again = model.students[0].copy()  # killed after ten steps: what it held is lost, the checkpoint is not
    resumed = distil_block(again, feed, schedule=schedule, hooks=TrainingHooks(saved=states[0]))
    assert resumed.after == pytest.approx(outcome.after, rel=1e-5)
    for a, b in zip(through.layer.parameters(), again.layer.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    dense, ids = model.lm, tiny.tokens(1, 8)
    assert torch.equal(dense(ids), planned("llama", tp=4, layers=1).lm(ids)), "the dense model is left alone"


def test_a_training_that_runs_off_into_no_number_goes_back_at_once() -> None:
    model, notes = planned("llama", tp=4, layers=1), []
    feed = Feed(model, sequences(16), batch_size=4)
    student = model.students[0].copy()
    schedule = Schedule(steps=12, check_every=3, rate=1e30)
    outcome = distil_block(student, feed, schedule=schedule, hooks=TrainingHooks(tick=notes.append))
    assert "error nan" in notes[0] and notes[0].endswith("rate times 0.25")
    assert math.isfinite(outcome.after) and all(p.isfinite().all() for p in student.layer.parameters())


def test_a_step_on_some_positions_of_a_large_vocabulary_still_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    model = planned("llama", tp=4, layers=2)
    feed = Feed(model, sequences(32), batch_size=4)
    kl = HeldOut(model, [[*t, 0] for t in sequences(32)[-4:]]).measure().kl()  # no next token of the last is counted
    monkeypatch.setattr(distillation, "LOGITS", 4 * 2 * model.lm.head.vocab_size)  # two positions of a batch at once
    monkeypatch.setattr(distillation, "LEARNED", 4 * 3 * model.lm.head.vocab_size)  # three in a step
    students = [model.students[i].copy() for i in (0, 1)]
    for student in students:
        model.put(student)
    mask = torch.ones(4, 8, dtype=torch.bool)
    all_of_them, *drawn = (distillation._positions(mask, model.lm.head.vocab_size, step) for step in (None, 0, 1))
    assert torch.cat(all_of_them).tolist() == list(range(8))
    assert all([len(piece) for piece in pieces] == [2, 1] for pieces in drawn)
    assert all(len(set(torch.cat(pieces).tolist())) == 3 for pieces in drawn)
    assert not torch.equal(*map(torch.cat, drawn))
    outcome = distil_together(students, feed, schedule=Schedule(steps=20, check_every=10), hooks=TrainingHooks())
    assert outcome.before == pytest.approx(kl, rel=1e-4) and outcome.after < 0.9 * outcome.before


def test_gradients_taken_piece_by_piece_are_those_of_the_whole() -> None:
    lm = planned("llama", tp=4, layers=1).lm
    generator = torch.Generator().manual_seed(0)
    dense, moved = (torch.randn(2, 5, lm.head.weight.shape[1], generator=generator) for _ in range(2))
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    pieces = [torch.tensor([4, 1]), torch.tensor([0])]
    final, naive = (moved.clone().requires_grad_() for _ in range(2))
    found = distillation._divergence(lm, lm.head, dense, final, mask=mask, pieces=pieces)
    (found / 3).backward()
    kl = torch.zeros(())
    for row, place in ((0, 0), (0, 1), (0, 4), (1, 0), (1, 1)):  # the last sequence ends behind two tokens
        p, q = ((lm.head.weight @ t[row, place]).softmax(-1) for t in (dense, naive))
        kl = kl + (p * (p / q).log()).sum()
    (kl / 3).backward()
    assert found.item() == pytest.approx(kl.item(), rel=1e-5)
    torch.testing.assert_close(final.grad, naive.grad, rtol=1e-4, atol=1e-6)


def test_a_mixed_training_multiplies_in_bfloat16_and_keeps_float32_weights() -> None:
    schedule, model = Schedule(steps=20, check_every=10, mixed=True), planned("llama", tp=4, layers=2)
    kl = HeldOut(model, [[*t, 0] for t in sequences(32)[-4:]]).measure().kl()  # no next token of the last is counted
    products = list[torch.dtype]()
    students = [model.students[i].copy() for i in (0, 1)]
    for student in students:
        model.put(student)
        student.block.mlps[0].register_forward_hook(lambda _mlp, _read, partial: products.append(partial.dtype))
    outcome = distil_together(students, Feed(model, sequences(32), batch_size=4), schedule=schedule)
    assert outcome.before == pytest.approx(kl, rel=0.05) and outcome.after < 0.9 * outcome.before
    assert {p.dtype for s in students for p in s.trainable()} == {torch.float32}
    assert set(products) == {torch.bfloat16}
    left = HeldOut(model, [[*t, 0] for t in sequences(32)[-4:]]).measure().kl()
    assert products[-1] == torch.float32 and left == pytest.approx(outcome.after, rel=0.05), "judged in float32"


def test_a_training_that_only_does_harm_stops_and_leaves_the_weights() -> None:
    model = planned("llama", tp=4, layers=1)
    student = model.students[0].copy()
    before = [p.clone() for p in student.trainable()]
    harmful = Schedule(steps=40, rate=10.0, warm_up=0.0, check_every=5, patience=0.25)
    outcome = distil_block(student, Feed(model, sequences(32), batch_size=4), schedule=harmful)
    assert outcome.steps == 10 and outcome.after == outcome.before, "a quarter of the steps without progress"
    assert all(torch.equal(p, b) for p, b in zip(student.trainable(), before, strict=True))


def test_a_rate_that_does_harm_is_lowered_until_it_helps() -> None:
    model = planned("llama", tp=4, layers=1)
    feed, notes, states = Feed(model, sequences(32), batch_size=4), list[str](), list[dict]()
    schedule = Schedule(steps=60, rate=2.0, check_every=5)
    keeping = TrainingHooks(tick=notes.append, save=lambda t: states.append(copy.deepcopy(t)))
    student = model.students[0].copy()
    outcome = distil_block(student, feed, schedule=schedule, hooks=keeping)
    assert outcome.after < 0.9 * outcome.before and outcome.steps == 60
    assert "rate times 0.25" in notes[0] and float(notes[-1].rpartition(" ")[2]) in (0.0625, 0.0156), notes
    again = model.students[0].copy()  # killed just after it had gone back
    distil_block(again, feed, schedule=schedule, hooks=TrainingHooks(saved=states[0]))
    for a, b in zip(student.trainable(), again.trainable(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def with_routers(model: PlannedModel) -> list[Student]:
    """Copies of the model's students, which it has from then on; what their routers read is far off."""
    for block, student in list(model.students.items()):
        generator = torch.Generator().manual_seed(block)
        router = Predictor(torch.randn(student.block.width, generator=generator))
        model.put(student.copy().with_router(router if student.parts.experts else None))
    return list(model.students.values())


def naive_router_kl(model: PlannedModel, batch: Batch, block: int, of_dense: torch.Tensor) -> float:
    """KL(dense || planned) of what a block's routers say, per token: token by token, expert by expert.

    `of_dense` are the dense model's logits, of transformers; the planned model's are what its router reads times its
    weight.
    """
    router, read = model.blocks[block].experts.router, []
    hook = router.register_forward_pre_hook(lambda m, args: read.append(args[0]))
    s = batch.planned
    for index in range(model.lm.num_blocks):
        s = model.run_block(index, s, **batch.kwargs[index])
    hook.remove()
    total = 0.0
    for p, u in zip(of_dense, read[0].flatten(0, -2), strict=True):
        q = [float(row @ u) for row in router.weight]
        of_p, of_q = (sum(math.exp(float(v)) for v in values) for values in (p, q))
        for a, b in zip(p.tolist(), q, strict=True):
            total += math.exp(a) / of_p * ((a - math.log(of_p)) - (b - math.log(of_q)))
    return total / len(of_dense)


@pytest.mark.parametrize("family", ["mixtral", "granitemoe"])  # whose routers give logits first, and last
def test_routers_learn_the_dense_models_choice(family: str) -> None:
    model = planned(family, tp=4, layers=2)
    feed = Feed(model, sequences(32), batch_size=4)
    students = with_routers(model)
    (batch,) = feed.choosing
    ids = torch.tensor(sequences(32)[-4:])
    with torch.no_grad():
        dense = tiny.build(family, layers=2)(ids, output_router_logits=True).router_logits

    def apart() -> float:
        return sum(naive_router_kl(model, batch, block, of_dense) for block, of_dense in enumerate(dense)) / 2

    text, naive = HeldOut(model, [[*t, 0] for t in ids.tolist()]), apart()
    before = text.measure().comparison()
    states: list[dict] = []
    schedule, keeping = (
        Schedule(steps=20, check_every=10),
        TrainingHooks(save=lambda t: states.append(copy.deepcopy(t))),
    )
    outcome = distil_together(students, feed, schedule=schedule, hooks=keeping)
    assert outcome.before == pytest.approx(before.kl + ROUTING * naive, rel=1e-4)
    assert naive > 0.1 and apart() < 0.5 * naive
    after = text.measure().comparison()
    assert after.kl < before.kl and after.routed_as_dense > before.routed_as_dense
    again = with_routers(model)  # killed after ten steps
    distil_together(again, feed, schedule=schedule, hooks=TrainingHooks(saved=states[0]))
    for student, through in zip(again, students, strict=True):
        for name, tensor in student.state().items():
            assert torch.allclose(tensor, through.state()[name], atol=1e-6), name


def test_a_blocks_router_learns_besides_what_its_block_gives() -> None:
    """The error of a block is its output's, as a share of what the block adds, and its router's if it has one."""
    model = planned("qwen2_moe", tp=2, layers=2)  # block 1 is dense
    feed, ids = Feed(model, sequences(32), batch_size=4), torch.tensor(sequences(32)[-4:])
    with torch.no_grad():
        dense = tiny.build("qwen2_moe", layers=2)(ids, output_router_logits=True, output_hidden_states=True)
    for student in with_routers(model):
        feed.move_to(student.index)
        (batch,) = feed.choosing
        y = student.run(batch.planned, **batch.kwargs[student.index]).shared
        x, target = batch.dense, feed.dense_output(batch)
        assert torch.allclose(x, dense.hidden_states[student.index], atol=1e-5)
        # where nothing else is known, an error counts as a share of the output, as all of it at most
        wrong, added = (
            (e.square().sum(-1) / target.square().sum(-1)).clamp(max=1).sum() for e in (y - target, target - x)
        )
        error = float(wrong / added)
        if student.index == 0:
            error += ROUTING * naive_router_kl(model, batch, 0, dense.router_logits[0])
        router = None if student.router is None else student.router.bias.clone()
        outcome = distil_block(student, feed, schedule=Schedule(steps=10, check_every=5))
        assert outcome.before == pytest.approx(error, rel=1e-4) and outcome.after < outcome.before
        assert router is None or not torch.equal(router, student.router.bias)


def test_a_blocks_error_counts_by_what_it_costs() -> None:
    """Token by token: a size by class, a direction, no token more than all of it wrong; starts by their weight."""
    model = planned("llama", tp=4, layers=1)
    feed, student = Feed(model, sequences(32), batch_size=4, starts=True), model.students[0].copy()
    with torch.no_grad():
        student.parts.down.weight *= 1.5  # so that some tokens are all wrong
    metric, sizes = torch.arange(1.0, student.block.width + 1), [1.0, 4.0, 50.0]
    (batch,) = feed.choosing
    edge = 1.001 * feed.dense_output(batch).square().mean(-1).sqrt().median()  # no token lies on it
    cost = ErrorCost(torch.diag(metric), edge[None], torch.tensor(sizes), torch.tensor(2.0))
    wrong, added, all_wrong = 0.0, 0.0, list[bool]()
    assert batch.starts is not None and batch.starts.weight < 1
    for part in (batch, batch.starts):
        y, target = student.run(part.planned, **part.kwargs[0]).shared, feed.dense_output(part)
        for row in range(len(target)):
            for place, (a, b, x) in enumerate(zip(y[row], target[row], part.dense[row], strict=True)):
                square = float(b.square().mean())
                size = sizes[2 if place == 0 else int(square > edge**2)]
                weight = part.weight * min(size * square / 2, 64) / square
                of_y, of_x, all_of_it = (float((metric * e.square()).sum()) for e in (a - b, x - b, b))
                wrong += weight * min(of_y, all_of_it)
                added += weight * min(of_x, all_of_it)
                all_wrong.append(of_y > all_of_it)
    assert any(all_wrong) and not all(all_wrong)
    outcome = distil_block(student, feed, cost=cost, schedule=Schedule(steps=20, check_every=10))
    assert outcome.before == pytest.approx(wrong / added, rel=1e-4) and outcome.after < 0.9 * outcome.before


def test_replicas_share_every_batch() -> None:
    """Five sequences in batches of three, two replicas: rows 0 and 2 | 1 of the first, 0 | 1 of the second."""
    model = planned(layers=4)
    sequences = [t.tolist()[: 8 + i] for i, t in enumerate(tiny.tokens(5, 16))]
    whole = Feed(model, sequences, batch_size=3)
    shares = [Feed(model, sequences, batch_size=3, replicas=SimpleNamespace(ranks=[r], size=2)) for r in (0, 1)]
    for number, rows in enumerate([([0, 2], [1]), ([0], [1])]):
        for share, own in zip(shares, rows, strict=True):
            batch = share.batches[number]
            torch.testing.assert_close(batch.dense, whole.batches[number].dense[own])
            assert torch.equal(batch.mask, whole.batches[number].mask[own])
    alone = Feed(model, sequences[:4], batch_size=3, replicas=SimpleNamespace(ranks=[1], size=2)).batches[1]
    assert len(alone.dense) == 1 and not alone.mask.any()  # no row is left for it
