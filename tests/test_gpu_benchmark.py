"""benchmarks/gpu.py runs, at toy sizes on a CPU, and a step that hangs costs the others nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.py"


def test_every_step_finds_what_it_says(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, "--toy", "-o", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert sorted(found) == ["cache", "check", "price", "price_one_kernel", "profile", "recover"]
    for step in ("price", "price_one_kernel"):
        rows = found[step]["rows"]
        assert len(rows) == 2 * 2 * 3  # batches, times of an all-reduce, variants
        for kept, dropped, added in zip(*[iter(rows)] * 3, strict=True):
            takes = kept["all_reduce_microseconds"]
            assert kept["layers"] == "kept" and kept["saved_microseconds_a_drop"] == 0
            assert kept["microseconds_a_layer"] > 2 * takes
            assert min(dropped["microseconds_a_layer"], added["microseconds_a_layer"]) > takes
    assert found["cache"]["same_bits_in_a_fresh_process"] and found["cache"]["cache_hits_in_a_fresh_process"] > 0
    assert found["cache"]["compiled_off_eager"] < 0.02
    assert found["check"]["ok"] and any(
        "torchrun" in row["what"] or "ranks" in row["what"] for row in found["check"]["rows"]
    )
    profile = found["profile"]
    assert profile["forwards"] == 1 + 1 + 2 / 3 + 1 / 3 and profile["tokens"] == 4 * 32
    assert len(profile["kl"]) == 3 and 0 < profile["share_of_matrix_rate"] < 1
    assert found["recover"]["kl_recovered"] <= found["recover"]["kl_of_the_plan"]


def test_a_step_that_is_not_done_in_time(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import gpu

    monkeypatch.setattr(gpu, "TOY_DEADLINE", 0.5)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--toy", "--only", "check", "recover", "-o", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"^1$"):
        gpu.main()
    for step in ("check", "recover"):
        assert json.loads((tmp_path / f"{step}.json").read_text())["error"] == "not done after 0.5 s"
