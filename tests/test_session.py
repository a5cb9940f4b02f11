"""From a folder on disk to a model on its ranks: every family, both widths of number, and the two steps of opening."""

import copy
from dataclasses import replace

import pytest
import reference
import tiny
import torch

from spd_calib.formats.drops import Drops, Strategy
from spd_calib.parallel.session import is_quantised_copy, open_session


@pytest.mark.parametrize("family", tiny.SUPPORTED)
def test_a_saved_model_runs_its_plan(family, tmp_path):
    model = tiny.build(family)
    session = open_session(str(tiny.save(model, tmp_path / "m")), 4)
    assert session.max_length == 128 and session.ref.architecture == type(model).__name__
    lm = session.load()
    strategies = [Strategy.BLOCK_DROP, Strategy.KEEP_SYNC, Strategy.PLAIN_DROP, Strategy.BLOCK_DROP]
    ids = tiny.tokens(2, 12)
    with lm.running(Drops.of_blocks(strategies)):
        assert (lm(ids) - reference.logits(model, ids, 4, list(map(str, strategies)))).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near_the_reference(dtype, tmp_path):
    model = tiny.build("llama")
    lm = open_session(str(tiny.save(model, tmp_path / "m")), 4).load(dtype=dtype)
    ids = tiny.tokens(2, 12)
    with lm.running(Drops.of_blocks([Strategy.BLOCK_DROP] * 4)):
        found = lm(ids)
    assert found.dtype == getattr(torch, dtype)
    assert (found.float() - reference.logits(model, ids, 4, ["block_drop"] * 4)).abs().mean() < 0.02


def test_the_weights_are_read_last(tmp_path, monkeypatch):
    """All that can be refused without the weights is refused before them."""
    from spd_calib.errors import InputError
    from spd_calib.parallel import session

    monkeypatch.setattr(session, "load_dense", lambda *a: pytest.fail("the weights were read"))
    folder = tiny.save(tiny.build_refused("hyperclovax_logits"), tmp_path / "m")
    with pytest.raises(InputError, match="differs"):
        open_session(str(folder), 2)
    open_session(str(tiny.save(tiny.build("opt"), tmp_path / "n")), 2)


def test_a_quantised_copy_differs_by_nothing_but_its_quantisation(tmp_path):
    session = open_session(str(tiny.save(tiny.build("llama"), tmp_path / "m")), 2)
    of, config = session.ref, copy.deepcopy(session.config)
    config.quantization_config = {"quant_method": "awq"}
    ref = of.model_copy(update={"quantised": "awq", "config_hash": "1" * 64, "weight_fingerprint": "2" * 64})
    quantised = replace(session, config=config, ref=ref)
    assert is_quantised_copy(quantised, of=of)
    assert not is_quantised_copy(session, of=of) and not is_quantised_copy(quantised, of=ref)
    for field, other in (("architecture", "B"), ("num_blocks", 5), ("config_hash", "3" * 64)):
        assert not is_quantised_copy(quantised, of=of.model_copy(update={field: other}))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_cuda_equals_the_cpu(tmp_path):
    session = open_session(str(tiny.save(tiny.build("llama"), tmp_path / "m")), 4)
    cpu, gpu = session.load("cpu"), session.load("cuda")
    ids = tiny.tokens(2, 12)
    drops = Drops.of_blocks([Strategy.BLOCK_DROP, Strategy.PLAIN_DROP] * 2)
    with cpu.running(drops), gpu.running(drops):
        assert (cpu(ids) - gpu(ids.cuda()).cpu()).abs().max() < 1e-4
