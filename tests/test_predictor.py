"""A rank's predictor: its formula, its form, and the tensors it is written as."""

import pytest
import torch
from predictors import KINDS, K, predictor

from spd_calib.errors import InputError
from spd_calib.formats.drops import NOTHING_DROPPED, Drop, Drops, Point, Strategy
from spd_calib.models.plan_files import predictor_tensors
from spd_calib.models.predictor import Predictor, check_predictors, check_router_predictor, predictor_shapes

DROP = Strategy.BLOCK_DROP


@pytest.mark.parametrize(("kind", "rank"), [("mean", 0), ("low_rank", 3), ("full", 0)])
def test_predictors_are_their_formulas(kind, rank):
    c = predictor(kind, 4, 6, 0)
    assert (c.kind, c.rank) == (kind, rank) and not any(p.requires_grad for p in c.parameters())
    z, partial = torch.randn(2, 5, 4), torch.randn(2, 5, 6)
    found = c(z, partial)
    for i in range(2):
        for t in range(5):
            expected = c.bias.clone()
            expected += z[i, t] @ c.w if kind == "full" else partial[i, t]
            if kind == "low_rank":
                expected += (z[i, t] @ c.a) @ c.b
            assert torch.allclose(found[i, t], expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_takes_the_place_of_the_share_in_every_form(kind):
    plain, scale = predictor(kind, 4, 6, 0), torch.randn(6)
    scaled = Predictor(plain.bias, scale=scale, a=plain.a, b=plain.b, w=plain.w)
    z, share = torch.randn(2, 5, 4), torch.randn(2, 5, 6)
    for i in range(2):
        for t in range(5):
            expected = plain.bias + scale * share[i, t]
            if kind == "full":
                expected = expected + z[i, t] @ plain.w
            if kind == "low_rank":
                expected = expected + (z[i, t] @ plain.a) @ plain.b
            assert torch.allclose(scaled(z, share)[i, t], expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_shapes_are_those_of_its_tensors(kind):
    found = {name: tuple(t.shape) for name, t in predictor(kind, 4, 6, 0).named_parameters()}
    assert found == predictor_shapes(kind, K, d_rank=4, d=6)


def test_a_predictor_of_other_sizes_is_refused():
    good = predictor("full", 4, 6, 0)
    check_predictors(1, {0: good, 1: good}, d_rank=4, d=6)
    for wrong in (predictor("full", 5, 6, 0), predictor("mean", 1, 7, 0)):
        with pytest.raises(InputError) as e:
            check_predictors(1, {0: good, 1: wrong}, d_rank=4, d=6)
        assert str(e.value) == "The compensation of block 1, rank 1, does not fit the model's heads and width."
    scaled = Predictor(torch.randn(6), scale=torch.randn(6))
    check_predictors(1, {0: scaled}, d_rank=4, d=6)
    with pytest.raises(InputError, match="rank 0"):
        check_predictors(1, {0: Predictor(torch.randn(6), scale=torch.randn(5))}, d_rank=4, d=6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_routers_predictor_reads_and_gives_the_models_width(kind):
    check_router_predictor(2, predictor(kind, 6, 6, 0), d=6)
    wrong = [predictor(kind, 7, 7, 0), Predictor(torch.zeros(6), scale=torch.zeros(6))]
    wrong += [] if kind == "mean" else [predictor(kind, 5, 6, 0)]
    for one in wrong:
        with pytest.raises(InputError) as e:
            check_router_predictor(2, one, d=6)
        assert str(e.value) == "The predictor of block 2's router does not fit the model's width."


@pytest.mark.parametrize("kind", KINDS)
def test_one_of_another_kind_of_number_is_a_copy(kind):
    c = predictor(kind, 4, 6, 0)
    assert c.like(torch.zeros(1)) is c
    half = c.like(torch.zeros(1, dtype=torch.bfloat16))
    assert half.kind == kind and {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in c.parameters()} == {torch.float32}
    for name, tensor in c.named_parameters():
        assert torch.equal(getattr(half, name), tensor.bfloat16())


def test_predictors_are_written_in_float32():
    bias, a, b = torch.randn(4), torch.randn(3, 2), torch.randn(2, 4)
    c = Predictor(bias.bfloat16(), a=a.bfloat16(), b=b.bfloat16())
    drops = Drops(
        {Point(7, "attention"): Drop(Strategy.BLOCK_DROP, {1: c}), Point(3, "mlp"): Drop(Strategy.BLOCK_DROP)}
    )
    found = predictor_tensors(drops)
    assert found.keys() == {f"blocks.7.ranks.1.{part}" for part in ("bias", "a", "b")}
    assert len(found) == 3 and all(t.dtype == torch.float32 and t.is_contiguous() for t in found.values())
    assert predictor_tensors(NOTHING_DROPPED) == {}
