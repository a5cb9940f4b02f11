"""vLLM is timed as it is served: what is timed, of which engine, and that its plan is refused or run."""

import pytest
from plans import write_plan

from spd_calib import RunOptions
from spd_calib.api.bench import bench
from spd_calib.errors import InputError
from spd_calib.formats.files import dumps
from spd_calib.formats.hardware import Hardware
from spd_calib.reporting import tables
from spd_calib.runtimes.bench import SIZES, BenchSettings
from spd_calib.runtimes.vllm import bench as timed

K, D = "keep_sync", "block_drop"


def test_engines_are_timed_as_they_are_served(folder_of, tmp_path, monkeypatch):
    monkeypatch.setattr(timed, "TURNS", 1)
    kinds = ["low_rank", None, None, None]
    plan = write_plan(tmp_path / "plan.json", folder_of("llama"), 2, [D, K, D, K], [D, K, K, K], kinds)
    arguments = ["--enforce-eager", "--max-model-len", "64", "--dtype", "bfloat16", "--max-num-seqs", "4"]
    settings, said = BenchSettings(rounds=2, batch_size=(1, 3), tokens=(8,), new_tokens=4), []
    monkeypatch.setattr(timed, "_time_steps", watched(timed._time_steps, said))
    found = bench(plan, runtime="vllm", as_served=arguments, settings=settings, run=RunOptions(device="cpu"))
    assert said == [9, 6, 5]  # all-reduces of a forward, engine by engine
    assert (found.runtime, found.execution, found.backend, found.provenance.dtype) == (
        "vllm", "eager", "gloo", "bfloat16",
    )  # fmt: skip
    assert [c.bytes for c in found.collectives] == list(SIZES)
    assert all(c.seconds.repeats == 2 and 0 < c.seconds.p10 <= c.seconds.median for c in found.collectives)
    assert {(s.phase, s.batch, s.tokens, s.blocks, s.dropped, s.seconds.repeats) for s in found.steps} == {
        (phase, batch, 8, blocks, dropped, 2 * repeats)
        for phase, repeats in (("prefill", 1), ("decode", 4))
        for batch in (1, 3)
        for blocks, dropped in (("dense", 0), ("plan", 3), ("every_block_dropped", 4))
    }
    assert Hardware.model_validate_json(dumps(found)) == found
    assert "step of vLLM, eager, on 2 ranks" in tables.hardware(found)[1].title


def watched(time_steps, said):
    """As time_steps, and says how many all-reduces each forward of the engine has."""

    def watching(engine, settings):
        engine.call("spd_all_reduces")
        found = time_steps(engine, settings)
        counts = {count for rank in engine.call("spd_all_reduces") for count in rank}
        said.extend(counts)
        return found

    return watching


def test_what_cannot_be_timed(folder_of, tmp_path):
    plan = write_plan(tmp_path / "plan.json", folder_of("llama"), 2, [D, K, D, K])
    with pytest.raises(InputError, match="give `runtime` vllm with them"):
        bench(plan, as_served=["--enforce-eager"])
    with pytest.raises(InputError, match="neither torchrun nor vllm"):
        bench(plan, runtime="sglang")
