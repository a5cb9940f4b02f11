"""Refitting weights: the regressions are those of raw activations, and outputs come nearer, on every rank alike."""

import pytest
import tiny
import torch
from planned_models import planned, sequences

from spd_calib.formats.drops import Drops, Point, Strategy
from spd_calib.parallel.streams import Streams
from spd_calib.recovery import refit, ridge
from spd_calib.recovery.error_cost import ErrorCost
from spd_calib.recovery.feed import START, STARTS, Batch, Feed
from spd_calib.recovery.planned_model import PlannedModel
from spd_calib.recovery.reads import settled

RIDGE = 1e-2


@pytest.fixture
def one_ridge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ridge, "RIDGES", (RIDGE,))


def lstsq(x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Ridge regression as a least-squares problem with more rows, on the activations themselves."""
    root = weights.sqrt()[:, None]
    scale = (RIDGE * (x * root).square().sum(0).mean()).sqrt()
    rows = torch.cat([x * root, scale * torch.eye(x.shape[1], dtype=x.dtype)])
    return torch.linalg.lstsq(rows, torch.cat([y * root, y.new_zeros(x.shape[1], y.shape[1])])).solution


def at_most_all(error: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    """What a token with a larger error than all of it counts less, so that it costs no more than all of it does."""
    return (of.square().sum(-1) / error.square().sum(-1)).clamp(max=1)


def by_hand(model: PlannedModel, feed: Feed, block: int, *, choosing: bool = False) -> dict[str, torch.Tensor]:
    """Stacked over the batches to fit on (or to choose by): outputs, what is and should be read by q, k, v, by MLPs."""
    dense = model.lm.blocks[block]
    parts, tp = model.students[block].parts, dense.comm.size
    found: dict[str, list[torch.Tensor]] = {}
    for batch in feed.regressed[choosing]:
        x, kwargs = feed.inputs(batch).shared, batch.kwargs[block]
        partials, heads = model.students[block].block.attend(feed.inputs(batch), **kwargs)
        bias = 0 if parts.o.bias is None else parts.o.bias
        should, _ = dense.attend(type(feed.inputs(batch))(batch.dense), **kwargs)
        rows = {
            "attention": parts.norm1(x),
            "attention should": parts.norm1(batch.dense),
            "mlp should": parts.norm2(batch.dense + sum(should) + bias),
            "dense": batch.dense,
            "heads": torch.cat(heads, -1),
            "h": batch.dense + sum(should) + bias,
            "before": x + sum(partials) + bias,
            "output": feed.dense_output(batch),
            "weight": torch.full((*batch.mask.shape, 1), batch.weight),
        }
        rows |= {f"mlp {r}": parts.norm2(x + partials[r] + bias) for r in range(tp)}
        for name, value in rows.items():
            found.setdefault(name, []).append(value[batch.mask].detach())
    return {name: torch.cat(rows).double() for name, rows in found.items()}


@pytest.mark.parametrize(("family", "weighted"), [("llama", True), ("llama", False), ("opt", True)])
def test_the_maps_are_regressions_on_raw_activations(one_ridge, family: str, weighted: bool) -> None:
    model = planned(family, tp=2, layers=2)
    feed = Feed(model, sequences(40), batch_size=4)
    feed.move_to(1)
    student = model.students[1].copy()
    rows, old = by_hand(model, feed, 1), model.students[1].parts
    n, d = rows["output"].shape
    median = 1.001 * rows["output"].square().mean(-1).sqrt().median()  # no token lies on it
    typical = 2 * median.square()
    cost = ErrorCost(torch.eye(d), median[None], torch.tensor([2.0, 6.0, 1e4]), typical) if weighted else None
    first = torch.cat([torch.arange(b.mask.shape[1]).expand_as(b.mask)[b.mask] == 0 for b in feed.fitting])

    def weights(y: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        """What an error costs, as a share of |y|, at most 64 times what is typical."""
        if not weighted:
            return torch.ones(n, dtype=y.dtype)
        squares = y.square().mean(-1)
        relative = torch.where(first, 1e4, torch.where(squares.sqrt() > median, 6.0, 2.0)) * squares
        return (relative / typical).clamp(max=64) / squares * part.square().mean(-1)

    def moved(
        x: torch.Tensor, should: torch.Tensor, w: torch.Tensor, by: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        features = x if family == "llama" else torch.cat([x, torch.ones(n, 1, dtype=x.dtype)], 1)
        change = lstsq(features, (should - x) @ w.T, by)  # of pre-activations, one by one
        return w + change[: x.shape[1]].T, change[x.shape[1] :].sum(0)

    refit.refit_attention(student, feed, cost=cost)
    by = weights(rows["dense"], rows["dense"])
    for name in ("q", "k", "v"):
        new, before = student.parts.reading[name], old.reading[name]
        expected, bias = moved(rows["attention"], rows["attention should"], before.weight.double(), by)
        assert torch.allclose(new.weight.double(), expected, atol=1e-5)
        if family == "opt":
            assert torch.allclose(new.bias.double(), before.bias + bias, atol=1e-5)
    student = model.students[1].copy()
    detail = refit.refit_mlp_inputs(student, feed, cost=cost)
    assert all(0 < fit["left"] < 1 for fit in detail.values())
    by = weights(rows["output"], rows["output"] - rows["h"])
    half = old.down.in_features // 2
    for layer, before in zip(student.parts.mlp_in, old.mlp_in, strict=True):
        for rank in range(2):
            own = slice(rank * half, (rank + 1) * half)
            expected, bias = moved(rows[f"mlp {rank}"], rows["mlp should"], before.weight[own].double(), by)
            assert torch.allclose(layer.weight[own].double(), expected, atol=1e-5)
            if family == "opt":
                assert torch.allclose(layer.bias[own].double(), before.bias[own] + bias, atol=1e-5)
    student = model.students[1].copy()
    if refit.refit_o(student, feed, cost=cost)["o"] is None:
        assert not weighted and torch.equal(student.parts.o.weight, old.o.weight)  # no gain on the tokens to choose by
        return
    x = rows["heads"] if family == "llama" else torch.cat([rows["heads"], torch.ones(n, 1, dtype=torch.float64)], 1)
    missing = rows["h"] - rows["before"]
    by = weights(rows["output"], torch.ones(n, 1)) * at_most_all(missing, rows["h"])
    change = lstsq(x, missing, by)
    assert torch.allclose(student.parts.o.weight.double(), old.o.weight + change[: old.o.in_features].T, atol=1e-5)


@pytest.mark.parametrize(("family", "starts"), [("llama", False), ("llama", True), ("opt", False)])
def test_down_is_a_weighted_regression_on_all_ranks_neurons(one_ridge, family: str, starts: bool) -> None:
    model = planned(family, tp=4, layers=2)
    feed = Feed(model, sequences(64), batch_size=4, starts=starts)
    feed.move_to(1)
    student, old = model.students[1].copy(), model.students[1].parts
    part, bias = old.down.in_features // 4, 0 if old.down.bias is None else old.down.bias.double()

    def regression(rows: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """All ranks' neurons, what down_proj leaves missing behind them, and the tokens' weights."""
        neurons = []
        for rank in range(4):
            u, own = rows[f"mlp {rank}"].float(), slice(rank * part, (rank + 1) * part)
            z = [u @ m.weight[own].T + (0 if m.bias is None else m.bias[own]) for m in old.mlp_in]
            neurons.append(old.activation(z[0]) * (z[1] if len(z) == 2 else 1))
        x = torch.cat(neurons, -1).detach().double()
        y = rows["output"] - rows["before"] - x @ old.down.weight.double().T - bias
        by = at_most_all(y, rows["output"]) * rows["weight"][:, 0] / rows["output"].square().mean(-1)
        return x if family == "llama" else torch.cat([x, x.new_ones(len(x), 1)], 1), y, by

    x, y, by = regression(by_hand(model, feed, 1))
    change = lstsq(x, y, by)
    before = refit.output_error(student, feed, feed.regressed[1])
    (detail,) = refit.refit_down(student, feed).values()
    assert torch.allclose(student.parts.down.weight.double(), old.down.weight + change[: 4 * part].T, atol=1e-4)
    x, y, by = regression(by_hand(model, feed, 1, choosing=True))
    left = ((y - x @ change).square().sum(-1) @ by) / (y.square().sum(-1) @ by)
    assert detail["left"] == pytest.approx(left.item(), rel=1e-3)  # moments foretell it
    after = refit.output_error(student, feed, feed.regressed[1])
    assert after < before
    if family == "opt":  # no token is more than all wrong, so it is that of the output, too
        assert after == pytest.approx(before * detail["left"], rel=1e-3)


def test_where_no_ridge_helps_the_weights_stay() -> None:
    fitting, choosing = ridge.Products(), ridge.Products()
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(50, 6, generator=generator) for _ in range(2))
    fitting.add(x, y)
    choosing.add(x, -y)  # the other way round
    assert ridge.Ridge(fitting, choosing).best() is None
    choosing = ridge.Products()
    choosing.add(x, y)
    fit = ridge.Ridge(fitting, choosing).best()
    assert fit is not None and fit.ridge == min(ridge.RIDGES)
    left = (y.double() - x.double() @ fit.change).square().sum() / y.double().square().sum()
    assert fit.left == pytest.approx(left.item(), rel=1e-5)


def test_the_ridge_is_that_of_least_error_on_the_tokens_to_choose_by() -> None:
    generator, found = torch.Generator().manual_seed(1), set()
    for noise in (0.1, 3.0):
        x, w = torch.randn(60, 6, generator=generator), torch.randn(6, 4, generator=generator)
        half = torch.randn(4, 4, generator=generator).double()
        y = x @ w + noise * torch.randn(60, 4, generator=generator)
        fitting, choosing = ridge.Products(), ridge.Products()
        fitting.add(x[:12], y[:12])
        choosing.add(x[12:], y[12:])
        fit = ridge.Ridge(fitting, choosing).best(half @ half.T)
        errors, x, y = {}, x.double(), y.double()
        for r in ridge.RIDGES:
            inverse = torch.linalg.inv(x[:12].T @ x[:12] + r * x[:12].square().sum(0).mean() * torch.eye(6).double())
            errors[r] = ((y[12:] - x[12:] @ inverse @ x[:12].T @ y[:12]) @ half).square().sum().item()
        assert fit is not None and fit.ridge == min(errors, key=errors.__getitem__)
        assert fit.left == pytest.approx(errors[fit.ridge] / (y[12:] @ half).square().sum().item(), rel=1e-4)
        found.add(fit.ridge)
    assert len(found) == 2  # the noisier text wants another


@pytest.mark.parametrize(("family", "tp"), [("llama", 8), ("qwen2", 4), ("gemma", 2), ("starcoder2", 2)])
def test_each_rank_keeps_rows_of_its_own(family: str, tp: int) -> None:
    """What the ranks run is the dense layer's slices, KV heads that ranks share included: it runs unsimulated too."""
    model = planned(family, tp=tp, layers=2)
    feed = Feed(model, sequences(40), batch_size=4)
    feed.move_to(1)
    before = model.students[1]
    student = before.copy()
    error = refit.output_error(before, feed, feed.choosing)
    refit.refit_attention(student, feed)
    refit.refit_o(student, feed)
    refit.refit_mlp_inputs(student, feed)
    refit.refit_down(student, feed)
    assert refit.output_error(student, feed, feed.choosing) < error
    assert not torch.equal(student.parts.by_head[0].weight, before.parts.by_head[0].weight)
    assert not torch.equal(student.parts.down.weight, before.parts.down.weight)
    for shared in ("norm1", "norm2"):
        one, two = (getattr(s.parts, shared).state_dict() for s in (before, student))
        assert all(torch.equal(one[k], two[k]) for k in one)


def test_streams_that_differ_by_rank_are_settled_before_they_are_compared() -> None:
    """Behind a deferred MLP q, k and v are left alone, and the rest still helps."""
    drops = Drops.of(
        {
            Point(0, "attention"): Strategy.BLOCK_DROP,
            Point(0, "mlp"): Strategy.BLOCK_DROP,
            Point(1, "attention"): Strategy.BLOCK_DROP,
        }
    )
    model = PlannedModel(tiny.build("llama", layers=3), 4, drops)
    feed = Feed(model, sequences(40), batch_size=4)
    for block in (0, 1):
        feed.move_to(block)
        student = model.students[block].copy()
        error = refit.output_error(student, feed, feed.choosing)
        assert bool(refit.refit_attention(student, feed)) == (block == 0)
        refit.refit_o(student, feed)
        refit.refit_mlp_inputs(student, feed)
        refit.refit_down(student, feed)
        assert refit.output_error(student, feed, feed.choosing) < error
        model.put(student)


def spoiled(batch: Batch, row: int) -> None:
    """Make the last token of a sequence, which no other reads, 10,000 times as large in the planned model."""
    stream = batch.planned.shared.clone()
    stream[row, -1] = 1e4 * torch.randn(stream.shape[-1], generator=torch.Generator().manual_seed(row))
    batch.planned = Streams(stream)


def test_a_token_that_is_wrong_without_measure_counts_as_one_that_is_all_wrong() -> None:
    model = planned(layers=1)
    feed, student = Feed(model, sequences(16), batch_size=4), model.students[0]
    batch = feed.choosing[0]
    y = feed.dense_output(batch)
    error = (settled(student.run(feed.inputs(batch), **feed.kwargs(batch))) - y).square().sum(-1) / y.square().sum(-1)
    error = error.clamp(max=1)
    assert refit.output_error(student, feed, [batch]) == pytest.approx(error.mean().item(), rel=1e-5)
    error[2, -1] = 1.0
    spoiled(batch, 2)
    assert refit.output_error(student, feed, [batch]) == pytest.approx(error.mean().item(), rel=1e-5)


@pytest.mark.parametrize("fit", [refit.refit_o, refit.refit_down])
def test_a_token_that_is_wrong_without_measure_is_not_what_is_fitted(one_ridge, fit) -> None:
    model, found = planned(layers=2), []
    for rows in ([], [0]):
        feed, student = Feed(model, sequences(64), batch_size=8), model.students[1].copy()
        feed.move_to(1)
        for row in rows:
            spoiled(feed.fitting[0], row)
        before = torch.cat([student.parts.o.weight.flatten(), student.parts.down.weight.flatten()]).clone()
        fit(student, feed)
        found.append(torch.cat([student.parts.o.weight.flatten(), student.parts.down.weight.flatten()]) - before)
    assert found[0].norm() > 0 and (found[1] - found[0]).norm() < 0.2 * found[0].norm()


def test_a_text_is_begun_anew_at_many_of_its_tokens_unless_all_of_it_begins_alike() -> None:
    model, text = planned(layers=2), sequences(16)
    feed = Feed(model, text, batch_size=4, starts=True)
    feed.move_to(1)
    for batch, first in zip(feed.batches, range(0, 16, 4), strict=True):
        starts = batch.starts
        assert starts.mask.shape[1] == START and starts.mask.all() and len(starts.mask) == 4 * STARTS
        assert starts.weight == pytest.approx(4 / len(starts.mask))
        pieces = torch.tensor([s[at : at + START] for s in text[first : first + 4] for at in range(1, 25 - START)])
        entering = Feed(model, pieces.tolist(), batch_size=len(pieces))
        entering.move_to(1)
        stands = entering.batches[0].planned.shared
        distance = (starts.planned.shared[:, None] - stands[None]).abs().amax((2, 3))
        assert distance.min(1).values.max() < 1e-5 and len(set(distance.argmin(1).tolist())) == 4 * STARTS
    assert feed.fitting[0].starts in feed.regressed[0] and feed.choosing[0].starts in feed.regressed[1]
    with_bos = Feed(model, [[7, *s] for s in text], batch_size=4, starts=True)
    assert all(batch.starts is None for batch in with_bos.batches) and with_bos.regressed[0] == with_bos.fitting
