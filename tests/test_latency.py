"""The latency model, against loops over single matrices, tokens and sync points; the tables that ship; the commands."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
from pydantic import ValidationError
from typer.testing import CliRunner

from spd_calib.cli.main import app
from spd_calib.errors import InputError, SpdError
from spd_calib.formats.common import ModelRef, Provenance, TensorParallel
from spd_calib.formats.drops import KEPT, Drop, Strategy
from spd_calib.formats.files import dumps
from spd_calib.formats.hardware import Collective, Hardware, TimedStep, Timing
from spd_calib.formats.machine import AllReduce, Machine
from spd_calib.formats.plan import Compensation, RouterPredictor
from spd_calib.planning.latency import LatencyModel, Step, Sync
from spd_calib.planning.machine_latency import ATTAINED, as_measured, held_against, on_machine
from spd_calib.planning.machine_tables import COLUMNS, interpolate, load, shipped
from spd_calib.planning.model_sizes import Added, ModelSizes, added_by, bytes_moved, flops, predictor_weights

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


def timing(seconds: float) -> Timing:
    return Timing(median=seconds, p10=seconds, p90=seconds, repeats=3)


def hardware(sizes: ModelSizes, dense: float, dropped: float) -> Hardware:
    return Hardware(
        model=ModelRef(
            id="m", architecture="L", num_blocks=sizes.blocks, config_hash=HASH, weight_fingerprint=HASH
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
            TimedStep(phase="decode", blocks="dense", dropped=0, batch=1, tokens=8, seconds=timing(dense)),
            TimedStep(phase="decode", blocks="every_block_dropped", dropped=sizes.blocks, batch=1, tokens=8,
                  seconds=timing(dropped)),
        ],
        provenance=Provenance(command="c", seed=0, device="cpu", dtype="float32", versions={}),
    )  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "opt", "starcoder2"])
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_bytes_and_flops_are_those_of_the_matrices_one_by_one(family, tp, phase):
    model = tiny.build(family)
    sizes, batch, context = ModelSizes.of(model), 3, 6
    weights, attention_flops, cache = 0.0, 0.0, 0
    new = context if phase == "prefill" else 1
    kv_heads = sizes.counts.kv_heads // tp
    for name, parameter in model.named_parameters():
        if "layers." in name and parameter.dim() == 2:
            weights += parameter.numel() / tp
    for _block in range(model.config.num_hidden_layers):
        for _sequence in range(batch):
            cache += 2 * kv_heads * sizes.counts.head_dim * context
            for token in range(new):
                keys = token + 0.5 if phase == "prefill" else context  # the half makes the sum context ** 2 / 2
                attention_flops += (sizes.counts.heads / tp) * keys * sizes.counts.head_dim * 2 * 2
    head = model.get_output_embeddings().weight.numel() / tp
    step = Step(phase, batch, context, 2)
    assert bytes_moved(sizes, step, tp=tp) == pytest.approx(2 * (weights + head + cache))
    assert flops(sizes, step, tp=tp) == pytest.approx(2 * batch * new * weights + 2 * batch * head + attention_flops)


def test_a_rank_holds_a_whole_kv_head_where_there_are_more_ranks():
    model = tiny.build("llama", num_attention_heads=4, num_key_value_heads=1)
    sizes, step = ModelSizes.of(model), Step("decode", 1, 5, 4)
    attention = model.model.layers[0].self_attn
    kv = attention.k_proj.weight.numel() + attention.v_proj.weight.numel()
    moved = bytes_moved(sizes, step, tp=4)
    split = (sizes.query_weights + sizes.mlp_weights) / 4
    cache = 2 * sizes.counts.head_dim * 5
    assert moved == pytest.approx(4 * (sizes.blocks * (split + kv + cache) + sizes.head_weights / 4))


def test_the_weights_of_predictors_counted_one_by_one():
    """Width 5, 4 heads of 3 over 2 ranks: a rank's head outputs are 6 values; a mean, rank 2, a full one.

    Then a router's, of rank 3 and of none, which reads 5 values, and a scale and a mean behind an MLP.
    """
    sizes = SimpleNamespace(counts=SimpleNamespace(heads=4, kv_heads=2, head_dim=3), width=5)

    def block(index: int, **forms) -> SimpleNamespace:
        return SimpleNamespace(
            index=index,
            **({"compensation": None, "router": None, "mlp_compensation": None, "replicated": None} | forms),
        )

    forms = [
        Compensation(kind="mean", rank=0),
        Compensation(kind="low_rank", rank=2),
        Compensation(kind="full", rank=0),
    ]
    blocks = [block(i, compensation=form) for i, form in enumerate([*forms, None])]
    blocks += [
        block(i, router=RouterPredictor(kind=k, rank=r)) for i, (k, r) in ((4, ("low_rank", 3)), (5, ("zero", 0)))
    ]
    blocks.append(block(6, mlp_compensation=Compensation(kind="mean", rank=0, scaled=True)))
    plan = SimpleNamespace(tensor_parallel=SimpleNamespace(size=2), blocks=blocks)
    of_attentions = 5 + (6 * 2 + 2 * 5 + 5) + (6 * 5 + 5)
    others = (5 * 3 + 3 * 5 + 5) + (5 + 5)
    assert predictor_weights(plan, sizes) == of_attentions + others
    # with the other rank's group, 2 heads of 3 values, the full one reads 12 values, the low-rank one as many
    for index in (1, 2):
        blocks[index].replicated = ((1,), (0,))
    assert predictor_weights(plan, sizes) == 5 + (12 * 2 + 2 * 5 + 5) + (12 * 5 + 5) + others


def test_what_a_plan_adds_to_a_rank_is_added_up():
    """4 KV groups of a query head of 8 columns, 64 wide: 4 matrices of 512 each; at TP 2 a rank lacks two of them."""
    sizes = ModelSizes.of(tiny.build("llama", num_attention_heads=4, num_key_value_heads=4, head_dim=8))
    assert sizes.width == 64
    both, one = ((2, 3), (0, 1)), ((2,), (0,))
    nothing = {"compensation": None, "router": None, "mlp_compensation": None}
    blocks = [SimpleNamespace(index=i, replicated=r, **nothing) for i, r in enumerate((both, None, one))]
    blocks[1].compensation = Compensation(kind="mean", rank=0)
    plan = SimpleNamespace(tensor_parallel=SimpleNamespace(size=2), blocks=blocks)
    assert added_by(plan, sizes) == Added(weights=3 * 4 * 512 + 64, cached=3 * 2 * 8, heads=3)


def test_interpolation_is_straight_in_log_log_and_honest_outside():
    table = {10: 1.0, 1000: 100.0, 100000: 200.0}
    assert interpolate(table, 10) == 1.0
    assert interpolate(table, 1000) == pytest.approx(100.0)
    assert interpolate(table, 100) == pytest.approx(10.0)
    slope = math.log(2) / math.log(100)
    assert interpolate(table, 4000) == pytest.approx(100 * 4**slope)
    assert interpolate(table, 3) == 1.0
    assert interpolate(table, 300000) == pytest.approx(600.0)


@pytest.mark.parametrize(("memory", "rate"), [(1e9, 1e15), (1e15, 1e9)])
def test_a_step_is_its_compute_and_the_all_reduces_that_are_left(memory, rate):
    sizes, step = ModelSizes.of(tiny.build("llama")), Step("decode", 2, 8, 2)
    found = on_machine(machine(2, memory, rate), sizes, tp=2, step=step)
    reads, computes = bytes_moved(sizes, step, tp=2) / memory, flops(sizes, step, tp=2) / rate
    one = interpolate({100: 1e-6, 10000: 1e-4}, 2 * sizes.width * 2)
    for dropped in range(2 * sizes.blocks):
        seconds = max(reads, computes) / ATTAINED
        for sync_point in range(2 * sizes.blocks):
            seconds += one if sync_point >= dropped else 0.0
        assert found.seconds(dropped) == pytest.approx(seconds)
        assert found.saved(dropped) == pytest.approx(1 - seconds / found.seconds(0))
    assert found.ceiling == found.saved(2 * sizes.blocks - 1)
    with pytest.raises(InputError, match="of 2 ranks, not of 4"):
        on_machine(machine(2), sizes, tp=4, step=step)


def test_where_the_engine_fuses_the_norm_a_dropped_sync_leaves_it():
    """Of the fused kernel's time only what the sync itself takes is saved, and only for messages that go by it."""
    sizes, fused = ModelSizes.of(tiny.build("llama")), {"max_bytes": 256, "left_seconds": 7e-7, "source": "test"}
    plain, with_fusion = machine(2), Machine.model_validate({**machine(2).model_dump(), "fused_norm": fused})
    for batch, left in ((1, 7e-7), (2, 7e-7), (3, 0.0)):  # messages of 128, 256 and 384 bytes
        step = Step("decode", batch, 8, 2)
        without, found = (on_machine(m, sizes, tp=2, step=step) for m in (plain, with_fusion))
        assert found.left == left and found.seconds(0) == without.seconds(0)
        for dropped in (1, 4, 7):
            assert found.seconds(dropped) == pytest.approx(without.seconds(dropped) + dropped * left)
            assert found.saved(dropped) == pytest.approx(1 - found.seconds(dropped) / found.seconds(0))
        assert found.ceiling == found.saved(2 * sizes.blocks - 1)
    slow = Machine.model_validate({**machine(2).model_dump(), "fused_norm": {**fused, "left_seconds": 1.0}})
    assert on_machine(slow, sizes, tp=2, step=Step("decode", 1, 8, 2)).saved(3) == 0  # never more than it takes


def test_no_plan_saves_more_than_the_ceiling():
    """Where the one sync that is left, and what waits for it, may have fewer bits."""
    step = Step("prefill", 1, 8, 2)
    model = LatencyModel(
        "m", step, blocks=3, compute=1.0, all_reduce=0.5, left=0.2, quantised={8: Sync(kept=0.25, left=0.1)}
    )
    found = model.latency(5, {8: 1})
    assert found.saved == found.ceiling == pytest.approx((5 * 0.4 + 0.25) / 4) and model.ceiling < found.ceiling
    assert model.latency(2).ceiling == model.ceiling
    with pytest.raises(SpdError, match=rf"all 5 there are {100 * found.ceiling:.3g} % \("):
        model.drops_for(0.99, available=3, bits=8)


def test_behind_a_norm_a_dropped_sync_makes_another_message_twice_as_wide():
    plain, behind = (ModelSizes.of(tiny.build(family)) for family in ("llama", "exaone4"))
    assert (plain.side_by_side, behind.side_by_side) == (False, True) and plain.width == behind.width
    steep = machine(2, table=((100, 1e-6), (1000, 1e-6), (10000, 1e-4)))
    for batch, costs in ((2, False), (40, True)):  # 256 bytes: 512 take as long; 5120 bytes: 10240 take longer
        step = Step("decode", batch, 8, 2)
        found = on_machine(steep, behind, tp=2, step=step)
        assert on_machine(steep, plain, tp=2, step=step).left == 0.0
        one, two = (interpolate({100: 1e-6, 1000: 1e-6, 10000: 1e-4}, n * batch * 64 * 2) for n in (1, 2))
        assert found.left == pytest.approx(two - one) and (found.left > 0) == costs
        assert found.seconds(3) == pytest.approx(found.compute + 5 * one + 3 * (two - one))


def test_the_table_of_hopper_knows_the_fused_kernel():
    found = load("h100-nvlink")
    assert isinstance(found, Machine) and found.fused_norm is not None and found.fused_norm.max_bytes == 2**19
    saved = found.all_reduces[0].seconds - found.fused_norm.left_seconds
    assert 1.5e-6 <= saved <= 2.5e-6  # of 5.3 us


def test_the_fewest_drops_that_reach_a_saving():
    model = LatencyModel("m", Step("decode", 1, 1, 2), blocks=5, compute=7.0, all_reduce=0.3)
    dense = 7.0 + 10 * 0.3
    for percent in range(27):
        wanted = percent / 100
        n = model.drops_for(wanted, available=9)
        assert n * 0.3 >= wanted * dense - 1e-9
        assert n == 0 or (n - 1) * 0.3 < wanted * dense - 1e-9
    with pytest.raises(SpdError, match=r"all 5 sync points profiled saves 15 %, all 9 there are 27 %"):
        model.drops_for(0.2, available=5)


def test_more_drops_than_there_are_save_nothing_more():
    model = LatencyModel("m", Step("decode", 1, 1, 2), blocks=5, compute=7.0, all_reduce=0.3)
    assert model.drops_for(0.15, available=5) == 5
    with pytest.raises(SpdError, match="beyond what can be saved"):
        model.drops_for(0.16, available=5)


def test_latency_as_it_stands_in_a_plan():
    step = Step("prefill", 3, 7, 2)
    assert LatencyModel("h", step, 4, 1.0, 0.125, left=0.0625).latency(2).left_seconds == 0.0625
    model = LatencyModel("h", step, 4, compute=1.0, all_reduce=0.125)
    found = model.latency(3)
    assert found.model_dump() == {
        "hardware": "h", "phase": "prefill", "batch": 3, "context": 7, "all_reduce_seconds": 0.125,
        "dense_seconds": 2.0, "planned_seconds": 1.625, "saved": 0.1875, "ceiling": 7 * 0.0625,
    }  # fmt: skip
    with pytest.raises(SpdError) as e:
        model.drops_for(0.5, available=3)
    assert str(e.value) == (
        "`min_speedup` 50% is beyond what can be saved here: dropping all 3 sync points profiled saves 18.8 %, all 7 "
        "there are 43.8 % (prefill, batch 3, context 7, h); ask for less."
    )
    assert model.drops_for(0.1875, available=3) == 3


@pytest.mark.parametrize("name", shipped())
def test_shipped_tables_name_their_source(name):
    found = load(name)
    assert isinstance(found, Machine)
    ranks = 2 if name == "dgx-spark-200gbe" else 4 if "-4" in name else 8
    assert (found.name, found.ranks) == (name, ranks)
    assert len(found.all_reduces) >= 3
    assert "data sheet" in found.source


def test_a_csv_is_read_and_a_bad_one_refused(tmp_path):
    head, file = ",".join(COLUMNS), tmp_path / "own.csv"
    file.write_text(f"{head}\n4,1024,1e-5,1e10,1e11\n4,4096,2e-5,1e10,1e11\n")
    found = load(str(file))
    assert isinstance(found, Machine)
    assert {r.bytes: r.seconds for r in found.all_reduces} == {1024: 1e-5, 4096: 2e-5}
    for bad in ("4,1024,1e-5,1e10,1e11\n8,2048,1e-5,1e10,1e11", "4,1024,x,1e10,1e11", "4,1024,0,1e10,1e11", ""):
        file.write_text(f"{head}\n{bad}\n")
        with pytest.raises(InputError, match="no table of all-reduces"):
            load(str(file))
    with pytest.raises(InputError, match="none of a100-nvlink"):
        load("h200")


def test_what_can_be_given_as_hardware(tmp_path):
    sizes = ModelSizes.of(tiny.build("llama"))
    measured = hardware(sizes, 1.0, 0.9)
    file = tmp_path / "bench.json"
    file.write_text(dumps(measured))
    assert load(str(file)) == measured
    file.rename(tmp_path / "bench.txt")
    assert load(str(tmp_path / "bench.txt")) == measured  # whatever it is called
    with pytest.raises(InputError, match=r"bench\.json"):
        load(str(file))
    with pytest.raises(InputError, match=r"`hardware` nothing is no file and none of a100-nvlink, a100-nvlink-nccl, "):
        load("nothing")
    table = tmp_path / "größe.csv"
    table.write_bytes(f"{','.join(COLUMNS)}\r\n4,1024,1e-5,1e10,1e11\r\n".encode())
    assert load(str(table)).name == "größe"
    table.write_text("ranks\n4\n")
    with pytest.raises(InputError, match="needs the columns ranks, bytes, seconds, "):
        load(str(table))


def test_a_table_of_other_ranks_names_the_way_out():
    with pytest.raises(InputError) as e:
        on_machine(machine(2), ModelSizes.of(tiny.build("llama")), tp=4, step=Step("decode", 1, 1, 2))
    assert str(e.value) == (
        "m holds all-reduce times of 2 ranks, not of 4, and how a link scales is not guessed; measure yours with "
        "`spd-calib bench`, or give a CSV of them."
    )


def test_a_measured_step_calibrates_and_is_held_against_the_others():
    sizes = ModelSizes.of(tiny.build("llama"))
    measured = hardware(sizes, dense=1.0, dropped=0.9)
    model = as_measured(measured, sizes, phase="decode", name="h")
    assert model.seconds(0) == pytest.approx(1.0)
    predicted, seen = held_against(measured, model)["every_block_dropped"]
    assert (predicted, seen) == (pytest.approx(1.0 - sizes.blocks * 1e-3), 0.9)
    with pytest.raises(InputError, match="shorter than its"):
        as_measured(hardware(sizes, 1e-3, 1e-3), sizes, phase="decode", name="h")
    with pytest.raises(InputError, match="no prefill step"):
        as_measured(measured, sizes, phase="prefill", name="h")


def test_one_of_several_measured_steps():
    sizes = ModelSizes.of(tiny.build("llama"))
    few, many = hardware(sizes, dense=1.0, dropped=0.9), hardware(sizes, dense=3.0, dropped=2.0)
    larger = [step.model_copy(update={"batch": 32}) for step in many.steps]
    both = few.model_copy(update={"steps": [*few.steps, *larger]})
    assert as_measured(both, sizes, phase="decode", name="h") == as_measured(few, sizes, phase="decode", name="h")
    model = as_measured(both, sizes, phase="decode", name="h", batch=32)
    assert model.step.batch == 32 and model.seconds(0) == pytest.approx(3.0)
    assert {seen for _, seen in held_against(both, model).values()} == {2.0}
    with pytest.raises(InputError, match="h holds steps of batch 1 and 8 tokens, batch 32 and 8 tokens; leave out"):
        as_measured(both, sizes, phase="decode", name="h", batch=2)


def of_prefill(sizes: ModelSizes, seconds: float, batch: int = 2, tokens: int = 8):
    """Measured prefill steps; an all-reduce takes 1 us a byte."""
    rows = [Collective(method="all_reduce", ranks=2, bytes=b, seconds=timing(1e-6 * b)) for b in (1, 10**9)]
    steps = [
        TimedStep(phase="prefill", blocks="dense", dropped=0, batch=batch, tokens=tokens, seconds=timing(seconds)),
        TimedStep(phase="prefill", blocks="every_block_dropped", dropped=sizes.blocks, batch=batch, tokens=tokens,
              seconds=timing(seconds / 2)),
        TimedStep(phase="decode", blocks="every_block_dropped", dropped=sizes.blocks, batch=1, tokens=8,
              seconds=timing(77.0)),
    ]  # fmt: skip
    return hardware(sizes, 1.0, 0.9).model_copy(update={"collectives": rows, "steps": steps})


def test_a_measured_prefill_step_is_of_all_its_tokens():
    sizes = ModelSizes.of(tiny.build("llama"))
    one = 1e-6 * 2 * 8 * sizes.width * 4
    measured = of_prefill(sizes, 1.0)
    model = as_measured(measured, sizes, phase="prefill", name="bench.json", added=Added(50))
    compute = 1.0 - 2 * sizes.blocks * one
    assert model.hardware == "bench.json" and model.step == Step("prefill", 2, 8, 4)
    assert model.all_reduce == pytest.approx(one) and model.compute == pytest.approx(compute)
    work = flops(sizes, model.step, tp=2)
    assert model.added == pytest.approx(compute * 2 * 16 * 50 / work)
    assert model.left == 0
    behind_norms = ModelSizes.of(tiny.build("gemma2"))
    wider = as_measured(of_prefill(behind_norms, 1.0), behind_norms, phase="prefill", name="h")
    assert wider.left == pytest.approx(wider.all_reduce)  # a message twice as wide takes twice as long here
    predicted, seen = held_against(measured, model)["every_block_dropped"]
    assert seen == 0.5 and predicted == pytest.approx(1.0 - sizes.blocks * one + model.added)
    with pytest.raises(InputError) as e:
        as_measured(of_prefill(sizes, 2 * sizes.blocks * model.all_reduce), sizes, phase="prefill", name="bench.json")
    assert f"shorter than its {2 * sizes.blocks} all-reduces timed alone" in str(e.value)


def test_predictors_take_their_time_in_every_step_but_the_dense_one():
    sizes, step = ModelSizes.of(tiny.build("llama")), Step("decode", 1, 8, 2)
    without, with_them = (on_machine(machine(memory=1e6), sizes, tp=4, step=step, added=Added(n)) for n in (0, 5))
    assert with_them.seconds(0) == without.seconds(0) and with_them.ceiling == without.ceiling
    assert with_them.seconds(3) - without.seconds(3) == pytest.approx(5 * 2 / (0.8 * 1e6))  # memory is the slower here
    assert with_them.saved(1) < 0 < without.saved(1), "an all-reduce of 1 us is not worth 12"
    assert with_them.saved(1) == pytest.approx(1 - with_them.seconds(1) / with_them.seconds(0))
    assert with_them.latency(1).saved == with_them.saved(1) and with_them.saved(0) == 0
    prompt = Step("prefill", 2, 8, 2)
    slow = machine(memory=1e12, rate=1e6)
    bare, slower = (on_machine(slow, sizes, tp=4, step=prompt, added=Added(n)).seconds(1) for n in (0, 5))
    assert slower - bare == pytest.approx(2 * 5 * 16 / (0.8 * 1e6))
    measured = hardware(sizes, dense=1.0, dropped=0.9)
    moved = bytes_moved(sizes, Step("decode", 1, 8, 4), tp=2)
    bare, slower = (as_measured(measured, sizes, phase="decode", name="h", added=Added(n)).seconds(1) for n in (0, 5))
    assert slower - bare == pytest.approx((1.0 - 2 * sizes.blocks * 1e-3) * 5 * 4 / moved)


def test_plan_asks_for_hardware_where_latency_is_asked_for(tmp_path):
    for extra in (["--min-speedup", "10%"], ["--batch", "2"], ["--phase", "training"]):
        result = CliRunner().invoke(app, ["plan", "results/demo/profile.json", "-o", str(tmp_path / "p.json"), *extra])
        assert result.exit_code == 2 or isinstance(result.exception, InputError)


def test_the_front_tells_what_every_size_saves(tmp_path):
    table, front = tmp_path / "t.csv", tmp_path / "front.json"
    table.write_text(f"{','.join(COLUMNS)}\n4,1024,1e-5,1e10,1e11\n")
    options = ["--pareto", str(front), "--hardware", str(table), "--context", "64"]
    result = CliRunner().invoke(app, ["plan", "results/demo/profile.json", *options])
    assert result.exit_code == 0, result.output
    points = json.loads(front.read_text())["points"]
    one = points[1]["saved"]["decode"]
    assert one > 0
    assert [p["saved"]["decode"] for p in points] == pytest.approx([one * p["drops"] for p in points])


def test_a_hybrid_is_counted_block_by_block():
    """Every second block has a linear attention: divided by head, and a state in place of a cache."""
    model = tiny.build("qwen3_5")
    sizes, step, tp = ModelSizes.of(model), Step("decode", 3, 50, 2), 2
    weights = cache = states = 0.0
    for layer in model.model.layers:
        weights += sum(p.numel() for p in layer.mlp.parameters()) / tp
        if layer.block_type == "linear_attention":
            mixer = layer.linear_attn
            linears = (mixer.in_proj_qkv, mixer.in_proj_z, mixer.in_proj_a, mixer.in_proj_b, mixer.out_proj)
            weights += sum(linear.weight.numel() for linear in linears) / tp
            states += 2 * mixer.num_v_heads * mixer.head_k_dim * mixer.head_v_dim / tp
        else:
            mixer = layer.self_attn
            linears = (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.o_proj)
            weights += sum(linear.weight.numel() for linear in linears) / tp
            cache += 2 * model.config.num_key_value_heads * mixer.head_dim / tp
    by_hand = 2 * (weights + model.lm_head.weight.numel() / tp + 3 * (50 * cache + states))
    assert bytes_moved(sizes, step, tp=tp) == pytest.approx(by_hand)
    config, heads = model.config, model.config.num_attention_heads / tp
    softmax = sum(layer.block_type != "linear_attention" for layer in model.model.layers)
    attended = softmax * heads * 3 * 50 * 2 * (2 * config.head_dim)  # a key and a value of every token before
    in_states = 3 * 6 * states / 2  # read, written to and asked, two for each number of each of three new tokens
    once = 2 * 3 * (weights + model.lm_head.weight.numel() / tp)
    assert flops(sizes, step, tp=tp) == pytest.approx(once + attended + in_states)


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v2"])
def test_of_a_mixture_the_experts_that_tokens_go_through_count(family):
    """Two tokens, each through k of E experts: both miss an expert by (1 - k / E) squared. A block is dense.

    The second has a latent attention: a latent of the cache, and what makes it, is whole on every rank.
    """
    model, tp, batch, context = tiny.build(family), 2, 2, 5
    config = model.config
    through = config.num_experts_per_tok / {"qwen2_moe": 6, "deepseek_v2": 8}[family]
    read = computed = 0.0
    for name, parameter in model.named_parameters():
        if "layers." not in name or parameter.dim() < 2 or ".gate.weight" in name or "shared_expert_gate" in name:
            continue  # norms and routers are left out
        own = parameter.numel() if "kv_a_proj" in name else parameter.numel() / tp
        stacked = parameter.dim() == 3
        read += own * (1 - (1 - through) ** batch if stacked else 1)
        computed += own * (through if stacked else 1)
    key, value, cached = 8, 8, 2 * 8  # one KV head of two on each rank
    if family == "deepseek_v2":
        key, value = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
        cached = config.kv_lora_rank + config.qk_rope_head_dim
    sizes, step = ModelSizes.of(model), Step("decode", batch, context, 4)
    head = model.get_output_embeddings().weight.numel() / tp
    assert bytes_moved(sizes, step, tp=tp) == pytest.approx(4 * (read + head + batch * 4 * context * cached))
    attended = 4 * config.num_attention_heads / tp * batch * context * 2 * (key + value)
    assert flops(sizes, step, tp=tp) == pytest.approx(2 * batch * (computed + head) + attended)


def test_bits_take_their_own_time_and_the_drops_before_them_theirs():
    """4 blocks, so 8 syncs of 16 s; a dropped one leaves 3 s, or 1 s where the sync that settles it has 4 bits."""
    of_bits = {8: Sync(9.0, 2.0), 4: Sync(5.0, 1.0)}
    model = LatencyModel("h", Step("prefill", 1, 1, 2), 4, 10.0, 16.0, left=3.0, quantised=of_bits)
    dense = 10 + 8 * 16
    assert model.seconds(0) == dense and model.seconds(0, {4: 8}) == 10 + 8 * 5
    assert model.seconds(2, {4: 6}) == 10 + 6 * 5 + 2 * 1
    assert model.seconds(2, {8: 3}) == pytest.approx(10 + 3 * 9 + 3 * 16 + 2 * (3 + 2) / 2)
    assert model.saved(2, {8: 3}) == pytest.approx(1 - model.seconds(2, {8: 3}) / dense)
    assert [model.rest(3, bits) for bits in (None, 8)] == [{}, {8: 5}]
    assert [model.of(d) for d in (KEPT, Drop(Strategy.KEEP_SYNC, bits=8), Drop(Strategy.PLAIN_DROP))] == [16, 9, 3]
    dearer = replace(model, quantised=of_bits | {4: Sync(5.0, 6.0)})  # behind norms: twice as wide, and packed
    assert dearer.of(Drop(Strategy.BLOCK_DROP)) == 6, "whichever bits the next sync has, no less is saved"
    found = model.latency(2, {4: 1, 8: 3})
    assert found.quantised_seconds == {8: 9.0, 4: 5.0} and list(found.quantised_seconds) == [8, 4]
    assert found.planned_seconds == model.seconds(2, {8: 3, 4: 1}) and found.dense_seconds == dense
    # 8 bits alone save 56 of 138 s, each drop 7 more (9, less the 2 that it leaves)
    assert [model.drops_for(s / dense, available=7, bits=8) for s in (56, 57, 70)] == [0, 1, 2]
    with pytest.raises(
        SpdError, match=r"all 2 sync points profiled saves 50\.7 % with 8 bits in every other sync, all 7"
    ):
        model.drops_for(0.9, available=2, bits=8)


@pytest.mark.parametrize("family", ["llama", "exaone4"])
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_a_quantised_sync_takes_the_time_of_its_bytes_and_of_packing_them(family, phase):
    """Of 64 values as many bytes as bits say, and three. Packing: a message in and out, and what is sent written once
    and read from each rank, or thrice written and read where 4 ranks take two shots."""
    sizes, step = ModelSizes.of(tiny.build(family)), Step(phase, 4, 300, 2)
    rate, table = 1e9, {100: 1e-6, 10000: 1e-4, 10**7: 1e-1}
    found = on_machine(machine(4, memory=rate, table=table.items()), sizes, tp=4, step=step)
    tokens = 1200 if phase == "prefill" else 4
    for bits in (8, 6, 4):
        one, two = 0.0, 0.0
        for width in (64, 128):
            sent = sum(64 * bits // 8 + 3 for _token in range(tokens) for _group in range(width // 64))
            moved = 2 * tokens * width * 2 + (3 if sent > 2**15 else 5) * sent
            one, two = two, interpolate(table, sent) + moved / (0.8 * rate)
        assert found.quantised[bits].kept == pytest.approx(one)
        assert found.quantised[bits].left == pytest.approx(two - one if sizes.side_by_side else 0.0)
    assert found.quantised[4].kept < found.quantised[6].kept < found.quantised[8].kept
    dropped, bits = 3, {8: 2}
    expected = found.seconds(dropped) - 2 * (found.all_reduce - found.quantised[8].kept)
    spread = dropped * 2 / (2 * sizes.blocks - dropped) * (found.left - found.quantised[8].left)
    assert found.seconds(dropped, bits) == pytest.approx(expected - spread)


def test_no_kernel_fuses_a_quantised_sync_with_the_norm_behind_it():
    sizes, step = ModelSizes.of(tiny.build("llama")), Step("decode", 1, 8, 2)
    bare = on_machine(machine(2), sizes, tp=2, step=step)
    fused = {"max_bytes": 256, "left_seconds": 7e-7, "source": "test"}
    with_kernel = on_machine(
        Machine.model_validate({**machine(2).model_dump(), "fused_norm": fused}), sizes, tp=2, step=step
    )
    for bits, sync in with_kernel.quantised.items():
        assert (sync.kept, sync.left) == (pytest.approx(bare.quantised[bits].kept + 7e-7), 7e-7)


def test_quantised_syncs_that_were_timed_are_priced_as_timed():
    """Else as sums of the bytes that they send: of 8 float32 tokens 64 wide, at 8 bits 8 * 67."""
    sizes = ModelSizes.of(tiny.build("llama"))
    measured = of_prefill(sizes, 1.0, batch=1)
    timed = [
        Collective(method="quantised_sync", bits=8, ranks=2, bytes=b, seconds=timing(2e-6 * b)) for b in (1, 10**9)
    ]
    model = as_measured(measured, sizes, phase="prefill", name="h")
    assert model.quantised[8] == Sync(pytest.approx(1e-6 * 8 * 67), 0.0)
    steps = [s.model_copy(update={"quantised": {8: 2}}) if s.dropped else s for s in measured.steps]
    with_rows = measured.model_copy(update={"collectives": [*measured.collectives, *timed], "steps": steps})
    again = as_measured(with_rows, sizes, phase="prefill", name="h")
    assert again.quantised[8].kept == pytest.approx(2e-6 * 8 * 64 * 4) and again.quantised[4] == model.quantised[4]
    wider = as_measured(with_rows, replace(sizes, width=65), phase="prefill", name="h")
    assert wider.quantised[8].kept == pytest.approx(2 * again.quantised[8].kept), "65 values are sent as 128"
    assert again.all_reduce == model.all_reduce, "which no quantised sync stands for"
    predicted, _ = held_against(with_rows, again)["every_block_dropped"]
    assert predicted == again.seconds(sizes.blocks, {8: 2}) != again.seconds(sizes.blocks)
    for method, bits in (("quantised_sync", None), ("all_reduce", 8)):
        with pytest.raises(ValidationError, match="a quantised sync has bits"):
            Collective(method=method, bits=bits, ranks=2, bytes=1, seconds=timing(1.0))
