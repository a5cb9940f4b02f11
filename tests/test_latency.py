"""The latency model, against loops over single matrices, tokens and sync points; the tables that ship; the commands."""

import json
import math

import pytest
import tiny
from typer.testing import CliRunner

from spd_calib.cli.main import app
from spd_calib.errors import InputError, SpdError
from spd_calib.formats.common import ModelRef, Provenance, TensorParallel
from spd_calib.formats.hardware import Collective, Hardware, Timing
from spd_calib.formats.hardware import Step as Timed
from spd_calib.formats.machine import AllReduce, Machine
from spd_calib.planning import latency
from spd_calib.planning.latency import LatencyModel, Shape, Step

HASH = "0" * 64


def machine(ranks=4, memory=1e9, rate=1e12, table=((100, 1e-6), (10000, 1e-4))) -> Machine:
    return Machine(
        name="m",
        source="made up",
        ranks=ranks,
        memory_bytes_per_second=memory,
        flops_per_second=rate,
        all_reduces=[AllReduce(bytes=b, seconds=s) for b, s in table],
    )


@pytest.mark.parametrize("family", ["llama", "opt", "starcoder2"])
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_bytes_and_flops_are_those_of_the_matrices_one_by_one(family, tp, phase):
    model = tiny.build(family)
    shape, batch, context = Shape.of(model), 3, 6
    weights, attention_flops, cache = 0.0, 0.0, 0
    new = context if phase == "prefill" else 1
    kv_heads = shape.counts.kv_heads // tp
    for name, parameter in model.named_parameters():
        if "layers." in name and parameter.dim() == 2:
            weights += parameter.numel() / tp
    for _block in range(model.config.num_hidden_layers):
        for _sequence in range(batch):
            cache += 2 * kv_heads * shape.counts.head_dim * context
            for token in range(new):
                keys = token + 0.5 if phase == "prefill" else context  # the half makes the sum context ** 2 / 2
                attention_flops += (shape.counts.heads / tp) * keys * shape.counts.head_dim * 2 * 2
    head = model.get_output_embeddings().weight.numel() / tp
    step = Step(phase, batch, context, 2)
    assert latency.bytes_moved(shape, tp, step) == pytest.approx(2 * (weights + head + cache))
    assert latency.flops(shape, tp, step) == pytest.approx(
        2 * batch * new * weights + 2 * batch * head + attention_flops
    )


def test_a_rank_holds_a_whole_kv_head_where_there_are_more_ranks():
    model = tiny.build("llama", num_attention_heads=4, num_key_value_heads=1)
    shape, step = Shape.of(model), Step("decode", 1, 5, 4)
    attention = model.model.layers[0].self_attn
    kv = attention.k_proj.weight.numel() + attention.v_proj.weight.numel()
    moved = latency.bytes_moved(shape, 4, step)
    split = (shape.query_weights + shape.mlp_weights) / 4
    cache = 2 * shape.counts.head_dim * 5
    assert moved == pytest.approx(4 * (shape.blocks * (split + kv + cache) + shape.head_weights / 4))


def test_interpolation_is_straight_in_log_log_and_honest_outside():
    table = {10: 1.0, 1000: 100.0, 100000: 200.0}
    assert latency.interpolate(table, 10) == 1.0
    assert latency.interpolate(table, 1000) == pytest.approx(100.0)
    assert latency.interpolate(table, 100) == pytest.approx(10.0)
    slope = math.log(2) / math.log(100)
    assert latency.interpolate(table, 4000) == pytest.approx(100 * 4**slope)
    assert latency.interpolate(table, 3) == 1.0
    assert latency.interpolate(table, 300000) == pytest.approx(600.0)


@pytest.mark.parametrize(("memory", "rate"), [(1e9, 1e15), (1e15, 1e9)])
def test_a_step_is_its_compute_and_the_all_reduces_that_are_left(memory, rate):
    shape, step = Shape.of(tiny.build("llama")), Step("decode", 2, 8, 2)
    found = latency.on_machine(machine(2, memory, rate), shape, 2, step)
    reads, computes = latency.bytes_moved(shape, 2, step) / memory, latency.flops(shape, 2, step) / rate
    one = latency.interpolate({100: 1e-6, 10000: 1e-4}, 2 * shape.width * 2)
    for dropped in range(2 * shape.blocks):
        seconds = max(reads, computes) / latency.ATTAINED
        for sync_point in range(2 * shape.blocks):
            seconds += one if sync_point >= dropped else 0.0
        assert found.seconds(dropped) == pytest.approx(seconds)
        assert found.saved(dropped) == pytest.approx(1 - seconds / found.seconds(0))
    assert found.ceiling == found.saved(2 * shape.blocks - 1)
    with pytest.raises(InputError, match="of 2 ranks, not of 4"):
        latency.on_machine(machine(2), shape, 4, step)


def test_the_fewest_drops_that_reach_a_saving():
    model = LatencyModel("m", Step("decode", 1, 1, 2), blocks=5, compute=7.0, all_reduce=0.3)
    dense = 7.0 + 10 * 0.3
    for percent in range(27):
        wanted = percent / 100
        n = model.drops_for(wanted, 9)
        assert n * 0.3 >= wanted * dense - 1e-9
        assert n == 0 or (n - 1) * 0.3 < wanted * dense - 1e-9
    with pytest.raises(SpdError, match=r"all 5 sync points profiled saves 15 %, all 9 there are 27 %"):
        model.drops_for(0.2, 5)


@pytest.mark.parametrize("name", latency.shipped())
def test_shipped_tables_name_their_source(name):
    found = latency.load(name)
    assert isinstance(found, Machine)
    assert (found.name, found.ranks, len(found.all_reduces)) == (name, 8, 3)
    assert "data sheet" in found.source


def test_a_csv_is_read_and_a_bad_one_refused(tmp_path):
    head, file = ",".join(latency.COLUMNS), tmp_path / "own.csv"
    file.write_text(f"{head}\n4,1024,1e-5,1e10,1e11\n4,4096,2e-5,1e10,1e11\n")
    found = latency.load(str(file))
    assert isinstance(found, Machine)
    assert {r.bytes: r.seconds for r in found.all_reduces} == {1024: 1e-5, 4096: 2e-5}
    for bad in ("4,1024,1e-5,1e10,1e11\n8,2048,1e-5,1e10,1e11", "4,1024,x,1e10,1e11", "4,1024,0,1e10,1e11", ""):
        file.write_text(f"{head}\n{bad}\n")
        with pytest.raises(InputError, match="no table of all-reduces"):
            latency.load(str(file))
    with pytest.raises(InputError, match="none of a100-nvlink"):
        latency.load("h200")


def timing(seconds: float) -> Timing:
    return Timing(median=seconds, p10=seconds, p90=seconds, repeats=3)


def hardware(shape: Shape, dense: float, dropped: float) -> Hardware:
    return Hardware(
        model=ModelRef(
            id="m", architecture="L", num_blocks=shape.blocks, config_hash=HASH, weight_fingerprint=HASH
        ),
        plan_sha256=HASH,
        tensor_parallel=TensorParallel(size=2),
        device="cpu",
        backend="gloo",
        nodes=1,
        collectives=[
            Collective(method="all_reduce", ranks=2, bytes=b, seconds=timing(1e-3)) for b in (1, 10**9)
        ],
        steps=[
            Timed(phase="decode", blocks="dense", dropped=0, batch=1, tokens=8, seconds=timing(dense)),
            Timed(phase="decode", blocks="every_block_dropped", dropped=shape.blocks, batch=1, tokens=8,
                  seconds=timing(dropped)),
        ],
        provenance=Provenance(command="c", seed=0, device="cpu", dtype="float32", versions={}),
    )  # fmt: skip


def test_a_measured_step_calibrates_and_is_held_against_the_others():
    shape = Shape.of(tiny.build("llama"))
    measured = hardware(shape, dense=1.0, dropped=0.9)
    model = latency.as_measured(measured, shape, "decode", "h")
    assert model.seconds(0) == pytest.approx(1.0)
    predicted, seen = latency.held_against(measured, model)["every_block_dropped"]
    assert (predicted, seen) == (pytest.approx(1.0 - shape.blocks * 1e-3), 0.9)
    with pytest.raises(InputError, match="shorter than its"):
        latency.as_measured(hardware(shape, 1e-3, 1e-3), shape, "decode", "h")
    with pytest.raises(InputError, match="no prefill step"):
        latency.as_measured(measured, shape, "prefill", "h")


def test_predictors_take_their_time_in_every_step_but_the_dense_one():
    shape, step = Shape.of(tiny.build("llama")), Step("decode", 1, 8, 2)
    without, with_them = (latency.on_machine(machine(memory=1e6), shape, 4, step, n) for n in (0, 5))
    assert with_them.seconds(0) == without.seconds(0) and with_them.ceiling == without.ceiling
    assert with_them.seconds(3) - without.seconds(3) == pytest.approx(5 * 2 / (0.8 * 1e6))  # memory is the slower here
    assert with_them.saved(1) < 0 < without.saved(1), "an all-reduce of 1 us is not worth 12"
    assert with_them.saved(1) == pytest.approx(1 - with_them.seconds(1) / with_them.seconds(0))
    assert with_them.latency(1).saved == with_them.saved(1) and with_them.saved(0) == 0
    prompt = Step("prefill", 2, 8, 2)
    slow = machine(memory=1e12, rate=1e6)
    bare, slower = (latency.on_machine(slow, shape, 4, prompt, n).seconds(1) for n in (0, 5))
    assert slower - bare == pytest.approx(2 * 5 * 16 / (0.8 * 1e6))
    measured = hardware(shape, dense=1.0, dropped=0.9)
    moved = latency.bytes_moved(shape, 2, Step("decode", 1, 8, 4))
    bare, slower = (latency.as_measured(measured, shape, "decode", "h", n).seconds(1) for n in (0, 5))
    assert slower - bare == pytest.approx((1.0 - 2 * shape.blocks * 1e-3) * 5 * 4 / moved)


def test_plan_asks_for_hardware_where_latency_is_asked_for(tmp_path):
    for extra in (["--min-speedup", "10%"], ["--batch", "2"], ["--phase", "training"]):
        result = CliRunner().invoke(app, ["plan", "results/demo/profile.json", "-o", str(tmp_path / "p.json"), *extra])
        assert result.exit_code == 2 or isinstance(result.exception, InputError)


def test_the_front_tells_what_every_size_saves(tmp_path):
    table, front = tmp_path / "t.csv", tmp_path / "front.json"
    table.write_text(f"{','.join(latency.COLUMNS)}\n4,1024,1e-5,1e10,1e11\n")
    options = ["--pareto", str(front), "--hardware", str(table), "--context", "64"]
    result = CliRunner().invoke(app, ["plan", "results/demo/profile.json", *options])
    assert result.exit_code == 0, result.output
    points = json.loads(front.read_text())["points"]
    one = points[1]["saved"]["decode"]
    assert one > 0
    assert [p["saved"]["decode"] for p in points] == pytest.approx([one * p["drops"] for p in points])
