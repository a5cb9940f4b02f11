"""A choice for prefill and one for decoding: the model that runs both, and the plan that holds them."""

import copy
import json
import os
from pathlib import Path

import plans
import pytest
import reference
import tiny
import torch
from pydantic import ValidationError

from spd_calib.api.check import check
from spd_calib.api.evaluate import evaluate
from spd_calib.api.generate import generate
from spd_calib.api.recover import recover
from spd_calib.errors import InputError
from spd_calib.formats.drops import NOTHING_DROPPED, Drop, Drops, Point, Strategy
from spd_calib.formats.files import read
from spd_calib.formats.phases import ByPhase
from spd_calib.formats.plan import Plan, requirements
from spd_calib.models.plan_files import load_drops, load_plan, load_plan_by_phase
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.parallel.session import open_session
from spd_calib.runtimes.plan_checks import check_requires
from spd_calib.runtimes.sglang import configure as sglang
from spd_calib.runtimes.torchrun.check import WORKER, check_torchrun
from spd_calib.runtimes.vllm import configure as vllm

KEEP, DROP, PLAIN = Strategy
TP, PROMPT, LENGTH = 4, 7, 13
ATTENTION = [DROP, KEEP, DROP, DROP]
MLP = [KEEP, DROP, DROP, KEEP]
LATE = {Point(i, "attention"): Drop(DROP) for i in (1, 3)}
BITS = {Point(0, "mlp"): Drop(KEEP, bits=4), Point(2, "attention"): Drop(KEEP, bits=8)}
PLAINLY = {Point(i, "attention"): Drop(PLAIN) for i in (0, 2)}
CHOICES = {
    "none": {},
    "late": LATE,
    "bits": LATE | BITS,
    "plain": PLAINLY,
    "all": Drops.of_blocks(ATTENTION, MLP).by_point,
}


def words(drops: Drops) -> dict[tuple[int, str], tuple[str, int | None]]:
    """As the reference takes them."""
    return {(p.block, p.sync_point): (str(d.strategy), d.bits) for p, d in drops.by_point.items()}


def reference_logits(model, ids, phases: ByPhase) -> torch.Tensor:
    blocks = model.config.num_hidden_layers
    attention, mlp = (
        [str(phases.decode.strategy(Point(i, kind))) for i in range(blocks)] for kind in ("attention", "mlp")
    )
    bits = {(p.block, p.sync_point): n for p, n in phases.decode.bits.items()}
    return reference.logits(model, ids, TP, attention, mlp, bits=bits, prefill=words(phases.prefill), prompt=PROMPT)


def served(lm: TensorParallelLM, ids: torch.Tensor) -> torch.Tensor:
    """Logits of all tokens: the prompt, then one token after the other with transformers' own cache."""
    with torch.no_grad():
        out = lm.model(input_ids=ids[:, :PROMPT], use_cache=True)
        found = [out.logits]
        for i in range(PROMPT, ids.shape[1]):
            out = lm.model(input_ids=ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize(("prefill", "decode"), [("all", "none"), ("none", "all"), ("all", "late"), ("plain", "all"),
                                                 ("late", "plain"), ("bits", "late"), ("all", "bits")])  # fmt: skip
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_each_phase_runs_its_own_choice_and_reads_the_others_cache(family, prefill, decode):
    model, ids = tiny.build(family), tiny.tokens(2, LENGTH)
    phases = ByPhase(Drops(CHOICES[prefill]), Drops(CHOICES[decode]))
    expected = reference_logits(model, ids, phases)
    lm = TensorParallelLM.simulated(copy.deepcopy(model), TP)
    with lm.running(phases):
        found = served(lm, ids)
    assert (found - expected).abs().max() < 1e-5
    with lm.running(phases.decode):
        assert (found - served(lm, ids)).abs().max() > 1e-3


def test_running_one_choice_is_as_before_and_what_ran_before_comes_back():
    lm, ids = TensorParallelLM.simulated(tiny.build("llama"), TP), tiny.tokens(2, LENGTH)
    drops = Drops(CHOICES["all"])
    dense = lm(ids)
    with lm.running(ByPhase.of(drops)):
        assert torch.equal(lm(ids), lm.logits(lm.resume(lm.record(ids), drops)))
        with lm.running(ByPhase(NOTHING_DROPPED, drops)):
            assert torch.equal(lm(ids), dense) and lm.record(ids).drops == NOTHING_DROPPED
            one = lm(ids[:, :1])  # a prompt of one token cannot be told from a token that is decoded
        assert torch.equal(lm(ids[:, :1]), one) and not torch.equal(lm(ids), dense)
    assert torch.equal(lm(ids), dense)


def test_heads_that_one_phase_replicates_are_in_the_cache_of_the_other():
    groups = tuple(((rank + 1) % TP,) for rank in range(TP))
    replicating = Drops({Point(1, "attention"): Drop(DROP, replicated=groups)})
    with pytest.raises(ValueError, match="replicate in both"):
        ByPhase(NOTHING_DROPPED, replicating)
    assert ByPhase(replicating | Drops(BITS), replicating).decode.replicated == {1: groups}


@pytest.fixture
def plan_file(llama, tmp_path):
    """Deferred MLPs and quantised syncs in prefill alone."""
    prefill = {
        0: {"strategy": DROP, "mlp_strategy": DROP},
        3: {"strategy": KEEP, "sync_bits": 8, "mlp_sync_bits": 4},
    }
    return plans.write_plan(
        tmp_path / "plan.json", llama, 2, [KEEP, DROP, KEEP, DROP], prefill=prefill,
        requires=["mlp_drop", "quantised_sync", "two_phases"],
    )  # fmt: skip


IN_THE_FILE = ByPhase(
    Drops(
        {
            Point(0, "attention"): Drop(DROP),
            Point(0, "mlp"): Drop(DROP),
            Point(1, "attention"): Drop(DROP),
            Point(3, "attention"): Drop(KEEP, bits=8),
            Point(3, "mlp"): Drop(KEEP, bits=4),
        }
    ),
    Drops.of({Point(1, "attention"): DROP, Point(3, "attention"): DROP}),
)


def test_a_plan_holds_both_choices_and_whoever_takes_one_refuses_it(plan_file, tmp_path):
    plan, phases = load_plan_by_phase(plan_file)
    assert plan.in_two_phases and phases == plan.by_phase == IN_THE_FILE and plan.drops == IN_THE_FILE.decode
    assert plan.requires == requirements(plan.blocks) == ["mlp_drop", "quantised_sync", "two_phases"]
    refusals = (
        lambda: load_plan(plan_file),
        lambda: load_drops(plan, None),
        lambda: evaluate(plan_file, tasks="demo"),
        lambda: recover(plan_file, data="demo", output=tmp_path / "out"),
        lambda: check(plan_file, runtime="vllm"),
    )
    for refused in refusals:
        with pytest.raises(InputError, match="a choice for prefill and another for decoding"):
            refused()


def test_an_engine_says_why_it_takes_one_choice(plan_file):
    plan = read(Plan, plan_file)
    for engine in (vllm, sglang):
        with pytest.raises(InputError, match=r"requires .*'two_phases', which .* does not have: one forward of"):
            check_requires(
                plan, plan_file, engine="x", supported={*engine.SUPPORTED, "quantised_sync"}, lacking=engine.LACKING
            )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"requires": []}, "mlp_drop"),
        ({"requires": ["mlp_drop", "quantised_sync"]}, "two_phases"),
        ({"requires": ["mlp_drop", "two_phases"]}, "quantised_sync"),
        ({"prefill": {"strategy": "keep_sync", "mlp_strategy": "block_drop"}, "block": 3}, "last block"),
        ({"prefill": {"strategy": "block_drop", "sync_bits": 8}, "block": 2}, "only a sync that is kept"),
        ({"prefill": {"strategy": "block_drop", "mlp_strategy": "plain_drop"}, "block": 2}, "mlp_strategy"),
        ({"replicated": [[1], [0]], "block": 1}, "neither predictors nor replicated"),
    ],
)
def test_what_a_plan_in_two_phases_cannot_be(plan_file, changes, words):
    document = json.loads(plan_file.read_text())
    block = document["blocks"][changes.pop("block", 0)]
    if "requires" not in changes:
        block.update(changes)
        changes = {"requires": document["requires"] + ["replicated_heads"] * ("replicated" in changes)}
    with pytest.raises(ValidationError, match=words):
        Plan.model_validate(document | changes)


def test_text_is_written_by_both_choices(plan_file, llama):
    """generate, from the plan's file, is a loop by hand over tokens, one choice for the first forward."""
    prompt = " ".join(tiny.stories(1)[0].split()[:9])
    (written,) = generate(plan_file, [prompt], new_tokens=6)
    session = open_session(str(llama), 2)
    lm = session.load()
    ids = session.tokenizer(prompt, return_tensors="pt")["input_ids"]
    first = ids.shape[1]
    with torch.no_grad():
        with lm.running(IN_THE_FILE.prefill):
            out = lm.model(input_ids=ids, use_cache=True)
        for _ in range(6):
            ids = torch.cat([ids, out.logits[:, -1:].argmax(-1)], 1)
            with lm.running(IN_THE_FILE.decode):
                out = lm.model(input_ids=ids[:, -1:], past_key_values=out.past_key_values, use_cache=True)
    assert written.text == session.tokenizer.decode(ids[0], skip_special_tokens=True) and ids.shape[1] == first + 6


@pytest.mark.parametrize("worker", [WORKER, "one_choice"])
def test_check_of_a_choice_for_each_phase(plan_file, llama, monkeypatch, worker):
    """Real ranks with their cache; a runtime that reads prompts by the choice of decoding is caught."""
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent / 'workers'}:{os.environ.get('PYTHONPATH', '')}")
    prompts = tiny.stories(2, shortest=6, longest=9)
    rows = check_torchrun(
        open_session(str(llama), 2), plan_file, drops=IN_THE_FILE, prompts=prompts, new_tokens=4, worker=worker
    )
    found = {row.what: row.found for row in rows}
    wrong = {row.what for row in rows if not row.ok}
    count = "plan: all-reduces per forward and rank, "
    assert found[f"{count}decode"] == "6" and found["dense: all-reduces per forward and rank"] == "8"
    if worker == WORKER:
        assert not wrong and found[f"{count}prefill"] == "5"
    else:
        assert found[f"{count}prefill"] == "6"
        assert {f"{count}prefill", "plan: bytes a token in each block's messages"} <= wrong
        assert all(what.startswith("plan: ") for what in wrong)


def test_real_ranks_are_the_simulation_to_the_fifth_digit(llama, tmp_path):
    """Without bits, whose rounding makes another draw: the log-probabilities of prompt and continuation."""
    prefill = {0: {"strategy": DROP}, 2: {"strategy": PLAIN, "mlp_strategy": DROP}, 3: {"strategy": KEEP}}
    plan = plans.write_plan(tmp_path / "plan.json", llama, 2, [KEEP, DROP, KEEP, DROP], prefill=prefill)
    session, (_, phases) = open_session(str(llama), 2), load_plan_by_phase(plan)
    rows = check_torchrun(session, plan, drops=phases, prompts=tiny.stories(1, shortest=6, longest=9), new_tokens=6)
    assert all(row.ok for row in rows)
    assert [float(row.found) < 1e-5 for row in rows if row.expected.startswith("max |")] == [True] * 6
