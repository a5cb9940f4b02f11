"""Recovery: every piece against a naive computation, the rule that nothing gets worse, and bad input."""

import copy
import errno
import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from scipy.optimize import linear_sum_assignment

from spd_calib.errors import InputError, SpdError
from spd_calib.formats.common import Strategy
from spd_calib.models.architecture import HeadCounts
from spd_calib.models.probe import find_layers
from spd_calib.parallel.compensation import Compensation
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.recovery import compensation, grouping
from spd_calib.recovery.assignment import balanced, order_of
from spd_calib.recovery.distillation import Schedule, distil_block
from spd_calib.recovery.journal import Journal
from spd_calib.recovery.moments import moments
from spd_calib.recovery.permute import permute_heads, permute_neurons
from spd_calib.recovery.planned import Feed, HeldOut, PlannedModel, fall
from spd_calib.recovery.recover import Options, recover
from spd_calib.sensitivity.tiers import tiers

KEEP, DROP = Strategy.KEEP_SYNC, Strategy.BLOCK_DROP


def sequences(n: int, length: int = 24, seed: int = 0) -> list[list[int]]:
    return tiny.tokens(n, length, seed=seed).tolist()


def planned(family: str = "llama", tp: int = 4, layers: int = 2, drop=None, **kw) -> PlannedModel:
    drop = range(layers) if drop is None else drop
    model = tiny.build(family, layers=layers, **kw)
    return PlannedModel(model, tp, [DROP if i in drop else KEEP for i in range(layers)], [KEEP] * layers)


# --- the order of heads and neurons


@pytest.mark.parametrize("family", tiny.SUPPORTED)
@pytest.mark.parametrize("tp", [2, 8])
def test_grouping_leaves_the_dense_function_alone(family: str, tp: int) -> None:
    model, ids = tiny.build(family, layers=2), tiny.tokens(2, 12)
    with torch.no_grad():
        before = model(ids).logits
        for parts in find_layers(model):
            counts = HeadCounts.of(parts)
            units, cells = grouping._units(counts, tp)
            rng = np.random.default_rng(0)
            shuffled = [m for members, _ in cells for m in rng.permutation(members)]
            heads = torch.tensor([h for u in shuffled for h in units[u]])
            permute_heads(parts, counts, heads)
            permute_neurons(parts, torch.from_numpy(rng.permutation(counts.neurons)))
        assert (model(ids).logits - before).abs().max() < 1e-5
        ranks = TensorParallelLM.simulated(model, tp)
        assert (ranks(ids) - before).abs().max() < 1e-4


def test_heads_of_one_kv_head_are_not_torn_apart() -> None:
    parts = find_layers(tiny.build("llama", layers=1))[0]
    with pytest.raises(ValueError, match="torn apart"):
        permute_heads(parts, HeadCounts.of(parts), torch.tensor([0, 4, 1, 2, 3, 5, 6, 7]))


@pytest.mark.parametrize(("ranks", "n"), [(2, 10), (4, 64), (8, 256)])
def test_the_assignment_is_balanced_and_as_cheap_as_scipys(ranks: int, n: int) -> None:
    rng = np.random.default_rng(ranks)
    for cost in (rng.random((ranks, n)), rng.lognormal(0, 2, (ranks, n)), np.ones((ranks, n)), -rng.random((ranks, n))):
        owner = balanced(cost)
        assert (np.bincount(owner, minlength=ranks) == n // ranks).all()
        wide = np.repeat(cost, n // ranks, 0)
        least = wide[linear_sum_assignment(wide)].sum()
        assert cost[owner, np.arange(n)].sum() == pytest.approx(least, rel=1e-12)
        assert sorted(order_of(owner, ranks)) == list(range(n))


def test_swapping_neurons_finds_errors_that_cancel() -> None:
    rng = np.random.default_rng(0)
    ranks, n = 2, 6
    x = rng.normal(size=(ranks * n, 40))
    gram = x @ x.T
    owner = balanced(np.diagonal(gram).reshape(ranks, n))

    def total(o: np.ndarray) -> float:
        return float(x[o * n + np.arange(n)].sum(0) @ x[o * n + np.arange(n)].sum(0))

    found = grouping.swap_neurons(gram, owner)
    assert (np.bincount(found) == n // ranks).all() and total(found) <= total(owner) + 1e-9
    for i in range(n):
        for j in range(n):
            swapped = found.copy()
            swapped[[i, j]] = swapped[[j, i]]
            assert total(swapped) >= total(found) - 1e-6


def test_neuron_costs_are_the_formula() -> None:
    model = planned("starcoder2", tp=2, layers=1)
    student, feed = model.students[0], Feed(model, sequences(3), 2)
    costs = grouping.neuron_costs(student, feed, feed.batches, own=True)
    expected = np.zeros_like(costs)
    parts, block = student.parts, student.block
    for batch in feed.batches:
        partials, _ = block.attend(batch.planned, **batch.kwargs[0])
        right = batch.dense + sum(partials) + parts.o.bias
        for rank in range(2):
            wrong = batch.dense + partials[rank] + parts.o.bias
            act = [parts.activation(parts.mlp_in[0](parts.norm2(h))) for h in (wrong, right)]
            error = (act[0] - act[1]).detach().double().square().sum((0, 1))
            expected[rank] += (error * parts.down.weight.double().square().sum(0)).numpy()
    assert np.allclose(costs, expected, rtol=1e-5)


def test_fisher_is_the_gradients_outer_product() -> None:
    model = planned(layers=2)
    found = grouping.fisher(Feed(model, sequences(4), 4), Feed(model, sequences(4), 4).batches)
    assert len(found) == 2
    for f in found:
        assert torch.allclose(f, f.T) and torch.linalg.eigvalsh(f).min() > 0


# --- compensation


def test_a_block_with_compensation_is_the_naive_one() -> None:
    model = tiny.build("opt", layers=1)
    parts, ids = find_layers(model)[0], tiny.tokens(2, 10)
    lm = TensorParallelLM.simulated(model, 4)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(*shape, generator=generator)

    forms = {
        "mean": [Compensation(draw(64)) for _ in range(4)],
        "low_rank": [Compensation(draw(64), a=draw(16, 3), b=draw(3, 64)) for _ in range(4)],
        "full": [Compensation(draw(64), w=draw(16, 64)) for _ in range(4)],
    }
    recording = lm.record(ids)
    x, kwargs = recording.streams[0].shared, recording.kwargs[0]
    for kind, predictors in forms.items():
        lm.set_strategies([DROP])
        lm.set_compensation({0: dict(enumerate(predictors))})
        with torch.no_grad():
            got = lm.blocks[0](x, **kwargs).shared
            z = []
            hook = parts.o.register_forward_pre_hook(lambda m, args, z=z: z.append(args[0]))
            a = parts.attention(hidden_states=parts.norm1(x), **kwargs)[0] - parts.o.bias
            hook.remove()
            y = x + a + parts.o.bias + parts.down.bias
            for rank, c in enumerate(predictors):
                own = slice(rank * 16, (rank + 1) * 16)
                z_own, partial = z[0][..., own], z[0][..., own] @ parts.o.weight[:, own].T
                predicted = {
                    "mean": lambda: partial + c.bias,  # noqa: B023
                    "low_rank": lambda: partial + c.bias + z_own @ c.a @ c.b,  # noqa: B023
                    "full": lambda: z_own @ c.w + c.bias,  # noqa: B023
                }[kind]()
                neurons = slice(rank * 32, (rank + 1) * 32)
                act = parts.activation(parts.mlp_in[0](parts.norm2(x + predicted + parts.o.bias)))[..., neurons]
                y = y + act @ parts.down.weight[:, neurons].T
        assert c.kind == kind and (got - y).abs().max() < 1e-5
    lm.keep_all()
    with torch.no_grad():
        assert torch.equal(lm(ids), lm.logits(recording.final))
    with pytest.raises(InputError, match="does not fit"):
        lm.set_compensation({0: {rank: Compensation(draw(32)) for rank in range(4)}})
    with pytest.raises(InputError, match="no predictor for rank 3 of 4"):
        lm.set_compensation({0: dict(enumerate(forms["mean"][:3]))})


def test_predictors_are_ridge_regressions_by_hand() -> None:
    model = planned("llama", tp=4, layers=1)
    student, feed = model.students[0], Feed(model, sequences(24), 4)
    train, kept = feed.batches[:-1], feed.batches[-1:]
    fitted, held = (moments(student, feed, part, True) for part in (train, kept))

    def raw(batches):
        z = torch.cat([torch.cat(student.block.attend(b.planned, **b.kwargs[0])[1], -1)[b.mask] for b in batches])
        return z.detach().double()

    z, o = raw(train), student.parts.o.weight.double().T
    assert torch.allclose(fitted.mean, z.mean(0)) and torch.allclose(fitted.covariance, torch.cov(z.T, correction=0))
    forms = [compensation.Form("mean"), compensation.Form("low_rank", 3), compensation.Form("full")]
    fits = {f.form.kind: f for f in compensation.fit(student, 4, fitted, held, forms)}
    left = dict.fromkeys(fits, 0.0)
    missed = 0.0
    for rank in range(4):
        own = slice(rank * 16, (rank + 1) * 16)
        z_held = raw(kept)
        target = z @ o - z[:, own] @ o[own]
        target_held = z_held @ o - z_held[:, own] @ o[own]
        missed += target_held.square().sum().item()
        centred, y = z[:, own] - z[:, own].mean(0), target - target.mean(0)
        predictors = {k: f.predictors[rank] for k, f in fits.items()}
        assert torch.allclose(predictors["mean"].bias.double(), target.mean(0), atol=1e-5)
        options = []
        for ridge in compensation.RIDGES:
            c = centred.T @ centred / len(z)
            c = c + ridge * c.diagonal().mean() * torch.eye(16)
            w = torch.linalg.solve(c, centred.T @ y / len(z))
            options.append((w, c))
        full = min(
            options,
            key=lambda t: (
                (z_held[:, own] @ t[0] + target.mean(0) - z[:, own].mean(0) @ t[0] - target_held).square().sum()
            ),
        )[0]
        assert torch.allclose(predictors["full"].w.double(), o[own] + full, atol=1e-4)
        slopes = []
        for w, c in options:
            vectors = torch.linalg.eigh(w.T @ c @ w).eigenvectors
            v = vectors[:, -3:]
            slopes.append(w @ v @ v.T)
        got = predictors["low_rank"].a.double() @ predictors["low_rank"].b.double()
        assert min((got - s).abs().max() for s in slopes) < 1e-4
        for kind, p in predictors.items():
            zo = z_held[:, own].float()
            predicted = p(zo, zo @ o[own].float()) - zo @ o[own].float()
            left[kind] += (predicted.double() - target_held).square().sum().item()
    for kind, fit in fits.items():
        assert fit.left == pytest.approx(left[kind] / missed, rel=1e-3)
    assert fits["full"].left <= fits["low_rank"].left <= fits["mean"].left


def test_the_ladder_and_the_choice_by_weights_read() -> None:
    assert [str(f) for f in compensation.ladder(0, 16)] == ["mean"]
    assert [str(f) for f in compensation.ladder(3, 16)] == ["mean", "rank 1", "rank 2", "rank 3"]
    assert [str(f) for f in compensation.ladder(None, 8)] == ["mean", "rank 1", "rank 2", "rank 4", "full"]
    fits = [
        compensation.Fit(f, [], left)
        for f, left in zip(compensation.ladder(None, 8), (0.9, 0.7, 0.69, 0.68, 0.67), strict=True)
    ]
    assert str(compensation.choose(fits, 8, 64, 10_000).form) == "rank 2"
    assert str(compensation.choose(fits, 8, 64, 10_000, exchange=0.0).form) == "full"
    assert str(compensation.choose(fits, 8, 64, 10_000, exchange=1e9).form) == "mean"


# --- distillation


def test_distillation_lessens_the_error_and_goes_on_after_a_kill() -> None:
    schedule = Schedule(steps=20, check_every=10)
    model = planned("llama", tp=4, layers=1)
    feed = Feed(model, sequences(32), 4)
    train, kept = feed.batches[:-1], feed.batches[-1:]
    through = model.student_of(0)
    states: list[dict] = []
    outcome = distil_block(through, feed, train, kept, True, schedule, save=lambda t: states.append(copy.deepcopy(t)))
    assert outcome.after < 0.9 * outcome.before and outcome.steps == 20
    again = model.student_of(0)  # killed after ten steps: what it held is lost, the checkpoint is not
    resumed = distil_block(again, feed, train, kept, True, schedule, saved=states[0])
    assert resumed.after == pytest.approx(outcome.after, rel=1e-5)
    for a, b in zip(through.layer.parameters(), again.layer.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    dense, ids = model.lm, tiny.tokens(1, 8)
    assert torch.equal(dense(ids), planned("llama", tp=4, layers=1).lm(ids)), "the dense model is left alone"


# --- the driver


def extreme(model: PlannedModel) -> dict:
    return dict.fromkeys(model.students, "extremely sensitive")


def test_replicas_share_every_batch() -> None:
    """Five sequences in batches of three, two replicas: rows 0 and 2 | 1 of the first, 0 | 1 of the second."""
    from types import SimpleNamespace

    model = PlannedModel(tiny.build("llama"), 4, [DROP] * 4, [KEEP] * 4)
    sequences = [t.tolist()[: 8 + i] for i, t in enumerate(tiny.tokens(5, 16))]
    whole = Feed(model, sequences, 3)
    shares = [Feed(model, sequences, 3, SimpleNamespace(ranks=[r], size=2)) for r in (0, 1)]
    for number, rows in enumerate([([0, 2], [1]), ([0], [1])]):
        for share, own in zip(shares, rows, strict=True):
            batch = share.batches[number]
            torch.testing.assert_close(batch.dense, whole.batches[number].dense[own])
            assert torch.equal(batch.mask, whole.batches[number].mask[own])
    alone = Feed(model, sequences[:4], 3, SimpleNamespace(ranks=[1], size=2)).batches[1]
    assert len(alone.dense) == 1 and not alone.mask.any()  # no row is left for it


def test_recovery_makes_the_whole_plan_better_and_only_keeps_what_does() -> None:
    model = planned("opt", tp=4, layers=2)
    schedule = Schedule(steps=15, check_every=5)
    options = Options(block_schedule=schedule, whole_schedule=schedule, batch_size=8)
    report = recover(model, sequences(48), sequences(12, seed=1), extreme(model), options)
    assert report.kl < 0.7 * report.kl_as_is
    assert {a.treatment for a in report.attempts} >= {"compensation", "grouping", "distillation"}
    now = report.kl_as_is
    for a in report.attempts:
        assert a.kl_before == pytest.approx(now) and a.kept == (a.fell > a.fell_stderr)
        now = a.kl_after if a.kept else now
    assert report.kl == pytest.approx(now) == HeldOut(model, sequences(12, seed=1)).measure().kl()
    json.dumps(report.json())
    everything = HeldOut(model, sequences(12, seed=1)).measure()
    assert fall(everything, everything) == (0.0, 0.0)


def test_a_bad_treatment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def ruin(student, *args, **kw):
        with torch.no_grad():
            student.parts.down.weight.mul_(-1)

    monkeypatch.setattr(grouping, "group_neurons", ruin)
    model = planned(layers=2, drop=[1])
    before = model.students[1]
    report = recover(model, sequences(16), sequences(6, seed=1), extreme(model), Options(methods=("grouping",)))
    assert [a.kept for a in report.attempts] == [False] and model.students[1] is before
    assert report.kl == report.kl_as_is


def test_insensitive_blocks_are_left_alone_and_sensitive_ones_are_not_regrouped() -> None:
    assert tiers({0: 0.01, 1: 0.3, 2: 0.9}) == {0: "insensitive", 1: "sensitive", 2: "extremely sensitive"}
    assert set(tiers({0: 0.01, 1: 0.3}, 0.0, 0.0).values()) == {"extremely sensitive"}
    with pytest.raises(InputError, match="not in order"):
        tiers({0: 0.1}, 0.5, 0.1)
    model = planned(layers=2)
    schedule = Schedule(steps=4, check_every=2)
    report = recover(
        model, sequences(16), sequences(4, seed=1), {0: "insensitive", 1: "sensitive"},
        Options(block_schedule=schedule, whole_schedule=schedule),
    )  # fmt: skip
    assert {a.block for a in report.attempts} == {1, None}
    assert not {"grouping", "grouping+compensation"} & {a.treatment for a in report.attempts}


def test_a_killed_recovery_goes_on_where_it_was(tmp_path: Path) -> None:
    schedule = Schedule(steps=6, check_every=2)
    options = Options(block_schedule=schedule, whole_schedule=schedule)
    run = (sequences(16), sequences(4, seed=1))
    whole = planned(layers=2)
    expected = recover(whole, *run, extreme(whole), options)

    class Killed(Exception):
        pass

    def kill(note: str) -> None:
        if "distilling block 1, step 4" in note:
            raise Killed

    model = planned(layers=2)
    with pytest.raises(Killed):
        recover(model, *run, extreme(model), options, Journal(tmp_path / "state", {"run": 1}), kill)
    model = planned(layers=2)
    report = recover(model, *run, extreme(model), options, Journal(tmp_path / "state", {"run": 1}))
    assert report.kl == pytest.approx(expected.kl, rel=1e-4)
    assert [(a.block, a.treatment) for a in report.attempts] == [(a.block, a.treatment) for a in expected.attempts]
    with pytest.raises(InputError, match="another recovery"):
        Journal(tmp_path / "state", {"run": 2})


def test_too_little_text_and_a_plan_that_drops_nothing() -> None:
    model = planned(layers=2)
    with pytest.raises(InputError, match="too few"):
        recover(model, sequences(3), sequences(3), extreme(model), Options())
    model = planned(layers=2, drop=[])
    with pytest.raises(InputError, match="drops nothing"):
        recover(model, sequences(16), sequences(3), {}, Options())


def full_disk(*args, **kw):
    raise OSError(errno.ENOSPC, "No space left on device")


# --- the files


def recovered(tmp_path: Path, llama: Path, text: Path, **kw):
    """A tiny plan, recovered without training; returns the plan and the folder."""
    from spd_calib.formats.common import TensorParallel
    from spd_calib.formats.plan import Budget, Plan, PlannedBlock, Predicted, Verified
    from spd_calib.models.load import load_dense
    from spd_calib.parallel.session import open_session
    from spd_calib.recovery import checkpoint, treatment
    from spd_calib.sensitivity.text import TextOptions, load_text

    session = open_session(str(llama), 4)
    options = TextOptions(str(text), 24, 24, 24, 8)
    found = load_text(options, session.tokenizer)
    dense = load_dense(session.source, session.config, device="cpu", dtype="float32")
    model = PlannedModel(dense, 4, [DROP] * 4, [KEEP] * 4)
    as_is = HeldOut(model, found.verification).measure().comparison()
    made = {"command": "test", "seed": 0, "device": "cpu", "dtype": "float32", "versions": {}}
    from spd_calib.formats.common import Provenance

    plan = Plan(
        model=session.ref,
        tensor_parallel=TensorParallel(size=4),
        blocks=[
            PlannedBlock(index=i, module=f"model.layers.{i}", strategy=DROP, kl=0.1, reason="test") for i in range(4)
        ],
        budget=Budget(kind="drop", value=4, strategies=[DROP]),
        predicted=Predicted(kl=as_is.kl, ppl_increase=as_is.ppl_increase, accuracy_drop=as_is.accuracy_drop),
        verified=Verified(**vars(as_is), text=found.verification_ref()),
        provenance=Provenance(**made),
    )
    block_tiers, _ = treatment.tiers_of(plan, 0.0, 0.0)
    report = recover(
        model, found.calibration[:-8], found.calibration[-8:], block_tiers, Options(CLOSED, exchange=0.0, **kw)
    )
    tally = HeldOut(model, found.verification).measure()
    new = checkpoint.write_checkpoint(
        tmp_path / "out",
        model,
        session.source,
        lambda ref, beside: treatment.new_plan(
            plan, model, report, tally, tally, found.verification_ref(), ref, beside, Provenance(**made)
        ),
        report.json(),
    )
    return plan, new, found, tally


CLOSED = ("grouping", "compensation")


def test_the_checkpoint_is_the_same_dense_model_and_its_plan_runs(tmp_path, llama, text, monkeypatch) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from spd_calib.formats.files import read
    from spd_calib.formats.plan import Plan
    from spd_calib.parallel.compensation import load_compensation
    from spd_calib.parallel.session import open_session
    from spd_calib.recovery import treatment
    from spd_calib.sensitivity.measure import Experiment, measure

    _, new, found, tally = recovered(tmp_path, llama, text)
    out, ids = tmp_path / "out", tiny.tokens(2, 16)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    with torch.no_grad():
        was, now = (AutoModelForCausalLM.from_pretrained(f)(ids).logits for f in (llama, out))
    assert (was - now).abs().max() < 1e-5
    assert (
        AutoTokenizer.from_pretrained(out)("a cat").input_ids == AutoTokenizer.from_pretrained(llama)("a cat").input_ids
    )
    plan = read(Plan, out / "plan.json")
    assert plan == new and plan.requires == ["compensation"] and plan.recovered_from is not None
    lm = open_session(plan.model.id, 4, plan.model).load()
    lm.set_compensation(load_compensation(plan, out / "plan.json"))
    again = measure(lm, found.verification, [Experiment(plan.strategies, plan.mlp_strategies)])[1][0]
    assert again.kl == pytest.approx(tally.kl(), rel=1e-4) == plan.verified.kl

    with pytest.raises(InputError, match="recovered already"):
        treatment.tiers_of(plan, None, None)
    loose = tmp_path / "elsewhere.json"
    loose.write_text((out / "plan.json").read_text())
    with pytest.raises(InputError, match="copy both files together"):
        load_compensation(plan, loose)
    file = out / "compensation.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match="not the file"):
        load_compensation(plan, out / "plan.json")
    for wrong in ("../x.safetensors", "/x.safetensors", "x.bin", ".x.safetensors"):
        text_of = json.loads((out / "plan.json").read_text())
        text_of["compensation"]["file"] = wrong
        loose.write_text(json.dumps(text_of))
        with pytest.raises(InputError, match="not a valid plan"):
            read(Plan, loose)
    for key in ("requires", "compensation"):
        text_of = json.loads((out / "plan.json").read_text())
        text_of[key] = [] if key == "requires" else None
        loose.write_text(json.dumps(text_of))
        with pytest.raises(InputError, match="not a valid plan"):
            read(Plan, loose)


def test_a_full_disk_leaves_no_half_written_checkpoint(tmp_path, llama, text, monkeypatch) -> None:
    from spd_calib.recovery import checkpoint

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(SpdError, match="No space left on device; make room"):
        recovered(tmp_path, llama, text, max_rank=0)
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_there_is_left_alone(tmp_path: Path) -> None:
    from spd_calib.recovery.checkpoint import check_output

    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").write_text("x")
    with pytest.raises(InputError, match="there already"):
        check_output(tmp_path / "there")
    with pytest.raises(InputError, match="does not exist"):
        check_output(tmp_path / "no" / "such")


# --- the command


def test_the_command(spd, tmp_path, profile_file, text) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    assert spd("plan", profile_file, "--drop", 1, "--strategy", "block_drop", "-o", plan, "--device", "cpu").code == 0
    given = ("--data", text, "--seq-len", 32, "--max-samples", 24, "--verify-samples", 6, "--device", "cpu")
    run = spd(
        "recover", plan, *given, "-o", out, "--methods", "compensation", "--max-rank", 0, "--tau1", 0, "--tau2", 0
    )
    assert run.code == 0 and "verified on other text" in run.err
    assert (out / "plan.json").exists() and not list(tmp_path.glob("*.partial"))
    report = json.loads((out / "recovery.json").read_text())
    assert report["kl"] <= report["kl_as_is"] and report["attempts"][0]["detail"]["form"] == "mean"

    bad = tmp_path / "bad"
    assert "none of grouping" in spd("recover", plan, *given, "-o", bad, "--methods", "magic").err
    assert "there already" in spd("recover", plan, *given, "-o", out).err
    changed = json.loads(plan.read_text())
    changed["model"]["weight_fingerprint"] = "0" * 64
    (tmp_path / "changed.json").write_text(json.dumps(changed))
    run = spd("recover", tmp_path / "changed.json", *given, "-o", bad)
    assert run.code == 2 and "the weights differs" in run.err
    for block in changed["blocks"]:
        block["strategy"] = "keep_sync"
    (tmp_path / "nothing.json").write_text(json.dumps(changed))
    run = spd("recover", tmp_path / "nothing.json", *given, "-o", bad)
    assert run.code == 2 and "nothing to recover" in run.err
    few = ("--data", text, "--seq-len", 32, "--max-samples", 6, "--verify-samples", 6, "--device", "cpu")
    run = spd("recover", plan, *few, "-o", bad)
    assert run.code == 2 and "too few" in run.err
    assert not bad.exists() and not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob(".bad*"))


# --- on a real model, where there is one


SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.mark.skipif(not (SHARED / "models/stories260k").exists(), reason="../shared/models/stories260k is not here")
@pytest.mark.parametrize(("methods", "bar"), [(("grouping",), 0.75), (CLOSED, 0.63)])
def test_stories260k_without_training(methods, bar: float) -> None:
    from spd_calib.models.load import load_dense, load_tokenizer, locate, read_config
    from spd_calib.sensitivity.text import TextOptions, load_text

    source = locate(str(SHARED / "models/stories260k"))
    config, tokenizer = read_config(source), load_tokenizer(source)
    model = PlannedModel(load_dense(source, config, device="cpu", dtype="float32"), 4, [DROP] * 5, [KEEP] * 5)
    fit = load_text(TextOptions(str(SHARED / "data/tinystories-calibration.jsonl"), 256, 64, 160, 32), tokenizer)
    other = load_text(TextOptions(str(SHARED / "data/tinystories-eval.jsonl"), 256, 128, 48, 1), tokenizer)
    measured = HeldOut(model, other.calibration)
    as_is = measured.measure().kl()
    options = Options(methods, exchange=0.0, batch_size=8)
    recover(model, fit.calibration, fit.verification, extreme(model), options)
    assert measured.measure().kl() <= bar * as_is
