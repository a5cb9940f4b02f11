"""Choosing where heads are replicated: what so many weights buy, and the blocks that win most for them."""

import json

import pytest
import tiny
from profiles import a, make_profile

from spd_calib.errors import InputError, SpdError
from spd_calib.formats.drops import Drops, Strategy
from spd_calib.formats.files import read
from spd_calib.formats.plan import Plan
from spd_calib.models.architecture import HeadCounts
from spd_calib.planning.latency import Step
from spd_calib.planning.machine_latency import on_machine
from spd_calib.planning.machine_tables import load
from spd_calib.planning.model_sizes import Added, ModelSizes, added_by_heads
from spd_calib.planning.replication import Affordable, Replicated, affordable, choose_replicated, following, without

DROP = Strategy.BLOCK_DROP
EVERY, SOME = ((1, 2), (0, 2), (0, 1)), ((1,), (2,), (0,))


def dense_weights(model, tp: int) -> float:
    """What a rank reads of a model whose every matrix is divided, with as many KV heads as divide, or more."""
    in_blocks = sum(p.numel() for n, p in model.named_parameters() if "layers." in n and p.dim() == 2)
    return (in_blocks + model.get_output_embeddings().weight.numel()) / tp


def test_what_so_many_weights_buy():
    """OPT's tiny one: 8 KV groups of 8 columns, 64 wide; at TP 2 a rank lacks 4, each 4 matrices' eighth."""
    model = tiny.build("opt")
    sizes, dense, group = ModelSizes.of(model), dense_weights(model, 2), 4 * 64 * 8
    assert 10 * group / dense > 0.12  # the last share below buys ten and a half groups
    for share, blocks, groups in ((4 * group, 1, 0), (4 * group - 1, 0, 3), (10.5 * group, 2, 2), (99 * group, 3, 0)):
        found = affordable(sizes, share / dense, tp=2, most=3)
        assert (found.blocks, len(found.some[0]) if found.some else 0) == (blocks, groups)
        assert found.added.weights == (4 * blocks + groups) * group and found.share == pytest.approx(
            found.added.weights / dense
        )
        assert found.every == ((4, 5, 6, 7), (0, 1, 2, 3))
    assert affordable(sizes, 2.1 * group / dense_weights(model, 4), tp=4, most=3).some == (
        (2, 3),
        (4, 5),
        (6, 7),
        (0, 1),
    )
    least = f"{100 * group / dense:.3g}"
    with pytest.raises(SpdError, match=f"`replicate` 0.5% .*less than one KV group takes in one block, {least} %"):
        affordable(sizes, 0.005, tp=2, most=3)
    with pytest.raises(SpdError, match="less than one KV group takes"):
        affordable(sizes, (group - 1) / dense, tp=2, most=3)
    with pytest.raises(InputError, match="has every head already"):
        affordable(sizes, 0.5, tp=1, most=3)


def test_where_replicating_a_block_of_an_8b_saves_time():
    """What docs/budget.md says of it: 32 heads, 8 KV heads, TP 8, by the shipped tables."""
    counts, head = HeadCounts(32, 8, 128, 14336), 128256 * 4096
    sizes = ModelSizes(32, 4096, counts, 2 * 4096**2, 2 * 4096 * 1024, 3 * 4096 * 14336, head, key_dim=128)
    added = added_by_heads(sizes, following(sizes, 7, tp=8), tp=8)
    assert round(2 * added.weights / 1e6) == 73

    def saves(hardware: str, phase: str, batch: int, context: int = 256) -> bool:
        model = on_machine(load(hardware), sizes, tp=8, step=Step(phase, batch, context, 2), added=added)
        return model.saved(1) > 0

    assert saves("rtx-pro-6000-pcie", "prefill", 1, 2048) and saves("rtx-pro-6000-pcie", "decode", 32)
    assert not saves("rtx-pro-6000-pcie", "decode", 1)
    assert not saves("h100-nvlink", "decode", 1) and not saves("h100-nvlink", "decode", 32)


def heads(blocks: int, some=None) -> Affordable:
    return Affordable(blocks, EVERY, some, Added(), 0.07)


def chosen(cost, number: int, given: Affordable) -> tuple[Replicated, int]:
    measured: list[Drops] = []

    def kl_of(plans):
        measured.extend(plans)
        return [cost(plan.replicated) for plan in plans]

    found = choose_replicated([a(i) for i in range(number)], given, kl_of=kl_of)
    assert all({p: plan.strategy(p) for p in plan} == dict.fromkeys(map(a, range(number)), DROP) for plan in measured)
    return found, len(measured)


def test_the_block_that_wins_most_is_taken_and_the_next_one_beside_it():
    """Blocks 1 and 2 win the same thing: with one of them the other wins little, and block 0 is the second."""
    alone = [0.3, 0.5, 0.45, 0.1, 0.05]

    def cost(replicated) -> float:
        won = sum(alone[b] * (1.0 if groups == EVERY else 0.5) for b, groups in replicated.items())
        return 2.0 - won + (0.4 if {1, 2} <= set(replicated) else 0.0)

    found, measured = chosen(cost, 5, heads(2))
    assert found.drops.replicated == {0: EVERY, 1: EVERY} and set(found.drops) == {a(0), a(1)}
    assert measured == 1 + 5 + 2  # block 2 once more, then block 0, which nothing else can beat
    found, _ = chosen(cost, 5, heads(2, SOME))
    assert found.drops.replicated == {0: EVERY, 1: EVERY, 3: SOME}
    assert [found.reasons[b].split(": ") for b in (0, 1, 3)] == [
        [f"{which} of other ranks replicated", f"KL {won} less where every block is dropped"]
        for which, won in (("all heads", "0.3"), ("all heads", "0.5"), ("1 KV group", "0.05"))
    ]
    two = ((1, 2), (2, 3), (0, 3), (0, 1))
    assert chosen(cost, 2, heads(0, two))[0].reasons[1].startswith("2 KV groups of other ranks replicated: ")
    assert chosen(cost, 5, heads(0, SOME))[0].drops.replicated == {1: SOME}


@pytest.mark.parametrize("fisher", [False, True])
def test_a_profile_without_what_is_dropped_in_any_case(fisher):
    if fisher:
        from profiles import fisher_profile, random_fisher

        profile = fisher_profile(random_fisher(3, 1))
    else:
        profile = make_profile([0.1, 0.2, 0.3], mlp=[0.01, 0.02])
    left = without(profile, Drops.of({a(1): Strategy.BLOCK_DROP}))
    kl, whole = (p.kl(Strategy.BLOCK_DROP) for p in (left, profile))
    assert kl == {block: whole[block] for block in (0, 2)}
    assert left.kl(Strategy.BLOCK_DROP, "mlp") == profile.kl(Strategy.BLOCK_DROP, "mlp")
    if fisher:
        assert left.fisher is not None and not any(a(1) in term for term in left.fisher.terms)
        left.fisher.model_validate(left.fisher.model_dump())  # still a triangle
        for term in left.fisher.terms:
            i, j = left.fisher.terms.index(term), profile.fisher.terms.index(term)
            assert left.fisher.matrix[i][0] == profile.fisher.matrix[j][0]


def test_a_plan_with_replicated_heads_from_profile_to_recovery(spd, llama, text, tmp_path):
    """Llama's two KV groups at TP 2: a rank lacks one. Two of four blocks get it; all four are dropped."""
    given = ("--data", text, "--seq-len", 24, "--device", "cpu")
    profile, plain, plan = (tmp_path / f"{n}.json" for n in ("profile", "plain", "plan"))
    assert spd("profile", llama, "--tp", 2, *given, "--max-samples", 12, "--verify-samples", 8,
               "--strategy", "block_drop", "-o", profile).code == 0  # fmt: skip
    assert spd("plan", profile, "--drop", "100%", "--device", "cpu", "-o", plain).code == 0
    done = spd("plan", profile, "--drop", "100%", "--device", "cpu", "--replicate", "15%", "-o", plan)
    assert done.code == 0, done.err
    assert "heads replicated in 2 blocks: a rank reads" in done.err and "1 KV group replicated" in done.err
    found, without_heads = read(Plan, plan), read(Plan, plain)
    assert found.requires == ["replicated_heads"] and len(found.drops) == 4 and found.budget.value == 4
    assert list(found.drops.replicated.values()) == [((1,), (0,))] * 2
    assert found.verified.kl < without_heads.verified.kl
    reasons = [b.reason for b in found.blocks if b.replicated]
    assert all("all heads of other ranks replicated: KL" in reason for reason in reasons)
    shown = spd("diff", plain, plan)
    assert shown.code == 0 and "2 sync points differ" in shown.out + shown.err
    assert spd("generate", plan, "--prompt", "the cat", "--new-tokens", 4, "--device", "cpu").code == 0
    done = spd("recover", plan, *given, "--max-samples", 40, "--verify-samples", 8, "-o", tmp_path / "recovered")
    assert done.code == 0, done.err
    recovered = read(Plan, tmp_path / "recovered" / "plan.json")
    assert recovered.drops.replicated == found.drops.replicated and "replicated_heads" in recovered.requires
    report = json.loads((tmp_path / "recovered" / "recovery.json").read_text())
    assert report["kl"] <= report["kl_as_is"]
    assert spd("check", tmp_path / "recovered" / "plan.json", "--device", "cpu").code == 0


def test_blocks_with_every_head_are_a_plan_by_themselves(spd, llama, text, tmp_path):
    """They cost nothing, so they keep any budget; what is predicted of a plan is more only where it drops more."""
    profile, plan = tmp_path / "profile.json", tmp_path / "plan.json"
    given = ("--data", text, "--seq-len", 24, "--max-samples", 12, "--verify-samples", 8, "--device", "cpu")
    assert spd("profile", llama, "--tp", 2, *given, "--strategy", "block_drop", "--sync-points", "attention,mlp",
               "-o", profile).code == 0  # fmt: skip
    for budget in (("--max-kl", "1e-6"), ("--max-ppl-increase", "1e-6"), ("--drop", 2)):
        done = spd("plan", profile, *budget, "--replicate", "15%", "--device", "cpu", "-o", plan)
        assert done.code == 0, done.err
        found = read(Plan, plan)
        assert len(found.drops) == len(found.drops.replicated) == 2 and abs(found.verified.kl) < 1e-6
        assert found.predicted.kl == pytest.approx(0.0, abs=1e-6)
    done = spd("plan", profile, "--drop", 3, "--replicate", "15%", "--device", "cpu", "-o", plan)
    found = read(Plan, plan)
    assert done.code == 0 and len(found.drops) == 3 and found.predicted.kl > 1e-3
