"""Models larger than memory: blocks read from disk when they run give what the model in memory gives."""

import pytest
import tiny
import torch

from spd_calib.errors import InputError
from spd_calib.formats.common import Strategy
from spd_calib.models.load import Source, read_config
from spd_calib.models.stream_load import load_streamed
from spd_calib.parallel.comm import Simulated
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.parallel.session import open_session
from spd_calib.sensitivity import together
from spd_calib.sensitivity.fisher import fisher
from spd_calib.sensitivity.measure import Experiment, measure

K, D, P = Strategy.KEEP_SYNC, Strategy.BLOCK_DROP, Strategy.PLAIN_DROP
FAMILIES = ("llama", "llama_bias", "qwen3", "gemma", "opt", "starcoder2")


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
    for attention, mlp in (([K] * 4, [K] * 4), ([D, P, D, K], [K, D, K, K])):
        for lm in (whole, streamed):
            lm.set_strategies(attention, mlp)
        assert torch.equal(whole(ids), streamed(ids))


def test_fisher_too(folder):
    session = open_session(str(folder / "llama"), 2)
    sequences = [tiny.tokens(1, n, seed=n)[0].tolist() for n in (12, 9, 14)]
    found = [
        fisher(lm, sequences, ["attention", "mlp"], 0.5, 2, 0, lambda *_: None)
        for lm in (session.load(), session.load(stream=True))
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("held", [2**29, 1])
def test_measurements_are_those_of_the_model_in_memory(folder, monkeypatch, held):
    """Carried through the blocks together, or one at a time."""
    monkeypatch.setattr(together, "HELD_BYTES", held)
    session = open_session(str(folder / "llama"), 2)
    sequences = [tiny.tokens(1, n, seed=n)[0].tolist() for n in (12, 9, 14, 14, 8)]
    experiments = [
        Experiment((D, K, K, K), (K,) * 4), Experiment((K, K, P, K), (K,) * 4), Experiment((K,) * 4, (K,) * 4),
        Experiment((D, P, D, K), (K, D, K, K)), Experiment((K, K, K, D), (K,) * 4),
    ]  # fmt: skip
    assert measure(session.load(stream=True), sequences, experiments, 2) == measure(
        session.load(), sequences, experiments, 2
    )


def test_one_blocks_weights_are_held_and_each_is_read_once_a_pass(folder):
    source = Source("x", folder / "llama", None)
    model, weights = load_streamed(source, read_config(source), device="cpu", dtype="float32")
    lm = TensorParallelLM(model, Simulated(2), sharded=True)
    reads = []

    def hold(block):
        if weights.held != block:
            reads.append(block)
        weights.hold(block)

    lm.read_blocks_by(hold)
    together.run_together(
        lm, tiny.tokens(2, 8), [Experiment((D, K, D, K), (K,) * 4), Experiment((K, D, K, K), (K,) * 4)]
    )
    assert reads == [0, 1, 2, 3]
    sizes = [
        sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in layer.parameters()}.values())
        for layer in lm.blocks
    ]
    assert max(sizes[:3]) < 200 < 10_000 < sizes[3]


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
