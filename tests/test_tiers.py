"""Stopping early: the interval against scipy and simulation, tiers against the whole run."""

import json

import pytest
import tiny
import torch

from spd_calib.errors import InputError
from spd_calib.formats.drops import Strategy
from spd_calib.formats.files import read
from spd_calib.formats.profile import Profile
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.sensitivity.measure import Subject
from spd_calib.sensitivity.metrics import Tally
from spd_calib.sensitivity.predictions import FIELDS
from spd_calib.sensitivity.profile import experiments, profile
from spd_calib.sensitivity.tiers import Stopping, tiers

DROP = Strategy.BLOCK_DROP


def tallies_of(kl: torch.Tensor, tokens: list[int]) -> list[Tally]:
    """kl [candidates, sequences], summed over each sequence's tokens."""
    found = []
    for row in kl:
        sums = torch.ones(len(tokens), 6, dtype=torch.float64)
        sums[:, FIELDS.index("kl")] = row
        found.append(Tally(list(sums), tokens))
    return found


def stop_early(kl: torch.Tensor, tokens: list[int], batch: int, confidence: float) -> tuple[dict, int]:
    """Tiers when candidates are measured batch by batch until they are decided, and sequences measured in all."""
    candidates, sequences = kl.shape
    stopping = Stopping([range(candidates)], confidence, sequences)
    active, seen, batches = set(range(candidates)), [0] * candidates, sequences // batch
    for number in range(1, batches + 1):
        for i in active:
            seen[i] = number * batch
        tallies = [tallies_of(kl[i : i + 1, : seen[i]], tokens[: seen[i]])[0] for i in range(candidates)]
        active -= stopping.decided(tallies, active, number, batches)
    while wanting := stopping.wanting(tallies, batches):
        for i in wanting:
            seen[i] = sequences
            tallies[i] = tallies_of(kl[i : i + 1], tokens)[0]
    return tiers({i: tally.comparison().kl for i, tally in enumerate(tallies)}), sum(seen)


def test_tiers_of_heavy_tailed_candidates_are_those_of_the_whole_text_as_often_as_promised():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    wrong, measured, trials = 0, 0, 150
    for _ in range(trials):
        tokens = torch.randint(10, 40, (64,), generator=generator)
        hard = (0.5 * normal(64)).exp()  # for every candidate
        kl = (2 * normal(12, 1)).exp() * hard * (0.5 * normal(12, 64)).exp() * tokens
        whole = tiers({i: tally.comparison().kl for i, tally in enumerate(tallies_of(kl, tokens.tolist()))})
        found, seen = stop_early(kl, tokens.tolist(), 4, 0.9)
        wrong += found != whole
        measured += seen
    assert wrong <= 0.1 * trials
    assert measured < 0.75 * trials * 12 * 64, "it pays, even on so short and uneven a text"


def test_candidates_at_a_threshold_are_measured_to_the_end():
    noise = 1 + torch.rand(4, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5
    kl = torch.tensor([[4.0], [1.0], [0.5], [0.01]], dtype=torch.float64) * noise
    kl[1] *= kl[[0, 2, 3]].sum() / (3 * kl[1].sum())  # now it is the mean of all four
    decided = Stopping([range(4)], 0.9, 64).decided(tallies_of(kl, [1] * 48), {0, 1, 2, 3}, 12, 16)
    assert 1 not in decided and {0, 3} <= decided


def test_nothing_is_decided_before_four_batches():
    kl = torch.tensor([[100.0], [1e-3]], dtype=torch.float64) * torch.linspace(0.9, 1.1, 64, dtype=torch.float64)
    stopping = Stopping([range(2)], 0.9, 64)
    assert stopping.decided(tallies_of(kl[:, :24], [1] * 24), {0, 1}, 3, 8) == set()
    assert stopping.decided(tallies_of(kl[:, :32], [1] * 32), {0, 1}, 4, 8) == {0, 1}


@pytest.fixture
def uneven():
    """A Llama whose block 0 alone matters much."""
    model = tiny.build("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.mul_(4)
        for layer in model.model.layers[2:]:
            layer.self_attn.o_proj.weight.mul_(0.02)
    return model


def test_what_was_stopped_is_measured_as_on_its_part_of_the_text(uneven):
    lm = TensorParallelLM.simulated(uneven, 2)
    sequences = tiny.tokens(40, 12).tolist()

    def run(sequences, confidence=None):
        done = []
        rows = list(experiments("single", [DROP, Strategy.PLAIN_DROP], num_blocks=4))

        def tick(i, tally):
            done.append(i)

        return profile(Subject(lm), sequences, rows=rows, batch_size=4, tick=tick, confidence=confidence), done

    (baseline, early, _), ticks = run(sequences, 0.9)
    (whole_baseline, whole, _), _ = run(sequences)
    assert len(ticks) == sum(m.sequences for m in early) // 4 < 8 * 10
    assert baseline == whole_baseline
    stopped = [m for m in early if m.stopped_early]
    assert stopped and all(m.sequences < 40 for m in stopped)
    for part in {m.sequences for m in stopped}:
        _, of_part, _ = run(sequences[:part])[0]
        for m, expected in zip(early, of_part, strict=True):
            if m.sequences == part:
                for field in ("kl", "kl_stderr", "nll_increase", "accuracy_drop", "ppl_increase", "tokens"):
                    assert getattr(m, field) == getattr(expected, field), field
                assert m.ppl == pytest.approx(baseline.ppl * (1 + m.ppl_increase))
    for strategy in (DROP, Strategy.PLAIN_DROP):
        a, b = ({m.block: m.kl for m in rows if m.strategy == strategy} for rows in (early, whole))
        assert tiers(a) == tiers(b)
    assert all(a == b for a, b in zip(early, whole, strict=True) if not a.stopped_early)


def test_the_command_says_what_was_stopped_and_plans_with_it(spd, uneven, text, tmp_path):
    model, output = tiny.save(uneven, tmp_path / "model"), tmp_path / "p.json"
    outcome = spd(
        "profile", model, "--tp", 2, "--data", text, "--seq-len", 16, "--max-samples", 32, "--verify-samples", 8,
        "--batch-size", 2, "--confidence", 0.9, "-o", output,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    found = read(Profile, output).measurements
    early = [m for m in found if m.stopped_early]
    assert early and f"{len(early)} of {len(found)} sync points needed less" in outcome.err
    assert "tier" in outcome.err
    assert spd("plan", output, "--drop", 2, "-o", tmp_path / "plan.json").code == 0
    old = json.loads(output.read_text())
    for m in old["measurements"]:
        del m["stopped_early"]
    output.write_text(json.dumps(old))
    assert not any(m.stopped_early for m in read(Profile, output).measurements)


@pytest.mark.parametrize("more", [["--method", "fisher"], ["--method", "cumulative"], ["--confidence", "1.5"]])
def test_confidence_where_it_means_nothing_is_refused(spd, llama, text, tmp_path, more):
    outcome = spd("profile", llama, "--tp", 2, "--data", text, "--confidence", 0.9, *more, "-o", tmp_path / "p.json")
    assert outcome.code == 2 and "--confidence" in outcome.err


def test_thresholds_out_of_order_are_refused():
    with pytest.raises(InputError, match="not in order"):
        tiers({0: 0.1}, 0.5, 0.1)
