"""Models larger than memory: blocks read from disk when they run give what the model in memory gives."""

import pytest
import tiny
import torch

from spd_calib.errors import InputError
from spd_calib.formats.drops import NOTHING_DROPPED, Drops, Point, Strategy
from spd_calib.models.load import Source, read_config
from spd_calib.models.stream_load import load_streamed
from spd_calib.parallel.comm import SimulatedComm
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.parallel.session import open_session
from spd_calib.sensitivity import lockstep
from spd_calib.sensitivity import measure as measuring
from spd_calib.sensitivity.fisher import predict
from spd_calib.sensitivity.measure import Subject, measure

K, D, P = Strategy.KEEP_SYNC, Strategy.BLOCK_DROP, Strategy.PLAIN_DROP
FAMILIES = ("llama", "llama_bias", "qwen3", "gemma", "opt", "starcoder2", "apertus", "granite", "phi3", "glm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streamed")
    for family in FAMILIES:
        tiny.save(tiny.build(family), folder / family)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_model_in_memory(folder, family):
    session, ids = open_session(str(folder / family), 2), tiny.tokens(2, 16)
    whole, streamed = session.load(), session.load(stream=True)
    assert streamed.streamed and not whole.streamed
    for drops in (NOTHING_DROPPED, Drops.of_blocks([D, P, D, K], [K, D, K, K])):
        with whole.running(drops), streamed.running(drops):
            assert torch.equal(whole(ids), streamed(ids))


def test_fisher_too(folder):
    session = open_session(str(folder / "llama"), 2)
    sequences = [tiny.tokens(1, n, seed=n)[0].tolist() for n in (12, 9, 14)]
    found = [
        predict(lm, sequences, sync_points=["attention", "mlp"], target_stderr=0.5, batch_size=2, seed=0)
        for lm in (session.load(), session.load(stream=True))
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("held", [2**29, 1])
def test_measurements_are_those_of_the_model_in_memory(folder, monkeypatch, held):
    """Carried through the blocks in lockstep, or one at a time."""
    monkeypatch.setattr(lockstep, "HELD_BYTES", held)
    session = open_session(str(folder / "llama"), 2)
    sequences = [tiny.tokens(1, n, seed=n)[0].tolist() for n in (12, 9, 14, 14, 8)]
    plans = [
        Drops.of_blocks((D, K, K, K)), Drops.of_blocks((K, K, P, K)), NOTHING_DROPPED,
        Drops.of_blocks((D, P, D, K), (K, D, K, K)), Drops.of_blocks((K, K, K, D)),
    ]  # fmt: skip
    streamed, whole = (
        measure(Subject(session.load(stream=stream)), sequences, plans=plans, batch_size=2) for stream in (True, False)
    )
    assert streamed == whole


@pytest.mark.parametrize(("held", "runs"), [(2**29, 1), (1, 3)])
def test_a_batch_goes_through_the_blocks_as_often_as_memory_asks_for(monkeypatch, held, runs):
    """Once with all plans, the dense model along with the first of them; or once for each plan."""
    monkeypatch.setattr(lockstep, "HELD_BYTES", held)
    lm, seen = TensorParallelLM.simulated(tiny.build("llama"), 2), []
    lm.streamed = True

    def run(lm, ids, plans):
        seen.append(plans)
        return lockstep.run_in_lockstep(lm, ids, plans)

    monkeypatch.setattr(measuring, "run_in_lockstep", run)
    plans = [Drops.of({Point(b, "attention"): D}) for b in range(3)]
    measure(Subject(lm), tiny.tokens(4, 8).tolist(), plans=plans, batch_size=2)
    assert seen == [plans[i : i + 3 // runs] for _ in range(2) for i in range(0, 3, 3 // runs)]


@pytest.mark.parametrize(("tp", "plans"), [(2, 3), (4, 1)])
def test_plans_are_held_by_what_their_hidden_states_take(monkeypatch, tp, plans):
    """The shared part and one for each rank: (1 + tp) tensors of 2 x 8 x 64 numbers of 4 bytes a plan."""
    monkeypatch.setattr(lockstep, "HELD_BYTES", 3 * 3 * 2 * 8 * 64 * 4)
    lm = TensorParallelLM.simulated(tiny.build("llama"), tp)
    assert lockstep.at_a_time(lm, tiny.tokens(2, 8)) == plans
    assert lockstep.at_a_time(lm, tiny.tokens(20, 8)) == 1, "one is always run"


def test_one_blocks_weights_are_held_and_each_is_read_once_a_pass(folder):
    source = Source("x", folder / "llama", None)
    model, weights = load_streamed(source, read_config(source), device="cpu", dtype="float32")
    lm = TensorParallelLM(model, SimulatedComm(2), sharded=True)
    reads = []

    def hold(block):
        if weights.held != block:
            reads.append(block)
        weights.hold(block)

    lm.read_blocks_by(hold)
    lockstep.run_in_lockstep(lm, tiny.tokens(2, 8), [Drops.of_blocks((D, K, D, K)), Drops.of_blocks((K, D, K, K))])
    assert reads == [0, 1, 2, 3]
    sizes = [
        sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in layer.parameters()}.values())
        for layer in lm.blocks
    ]
    assert max(sizes[:3]) < 1000 < 10_000 < sizes[3]  # norms and biases stay


def test_plans_in_lockstep_leave_the_dense_models_way_where_they_first_drop(folder):
    """Up to there a block is run once for all of them, whatever the model runs outside."""
    session, ids = open_session(str(folder / "llama"), 2), tiny.tokens(2, 8)
    lm = session.load()
    plans = [Drops.of_blocks((K, K, D, K)), NOTHING_DROPPED, Drops.of_blocks((K, P, K, K), (K, D, K, K))]
    runs: dict[int, int] = {}
    for i, block in enumerate(lm.blocks):
        block.mlps[0].register_forward_hook(lambda m, args, out, i=i: runs.update({i: runs.get(i, 0) + 1}))
    with lm.running(Drops.of({Point(0, "attention"): P})):
        dense, finals = lockstep.run_in_lockstep(lm, ids, plans)
    assert runs == {0: 1, 1: 2, 2: 3, 3: 3}
    recording = lm.record(ids)
    assert torch.equal(dense.final, recording.final) and finals[1].final is dense.final
    for drops, of_plan in zip(plans, finals, strict=True):
        assert torch.equal(lm.logits(of_plan.final), lm.logits(lm.resume(recording, drops)))


def test_a_weight_that_is_not_there_is_named(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    model = tiny.save(tiny.build("llama"), tmp_path / "m")
    session = open_session(str(model), 2)
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lack model\.layers\.2\.mlp\.up_proj\.weight"):
        session.load(stream=True)


def test_what_does_not_fit_is_streamed(folder, monkeypatch):
    from spd_calib.models import stream_load

    session = open_session(str(folder / "llama"), 2)
    monkeypatch.setattr(stream_load, "_free_memory", lambda device: 1000.0)
    assert session.load().streamed
