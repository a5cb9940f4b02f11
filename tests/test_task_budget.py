"""Budgets of accuracy on lm-eval tasks: chosen on every second document, verified on the others."""

import json
import math
import statistics

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from spd_calib.demo.assets import model_dir, tasks_dir
from spd_calib.formats.drops import Drops, Strategy
from spd_calib.formats.files import read
from spd_calib.formats.plan import Budget, Plan
from spd_calib.formats.profile import Comparison
from spd_calib.parallel.session import open_session
from spd_calib.planning.budget import cost, describe, kept, stderr

LIMIT = 24
TASKS = {"spd_demo_where": "where", "spd_demo_count": "count"}


@pytest.fixture(scope="module")
def demo_profile(tmp_path_factory):
    from spd_calib import RunOptions, TextSelection, profile
    from spd_calib.formats.files import dumps

    path, text = tmp_path_factory.mktemp("tasks") / "p.json", TextSelection(seq_len=48, max_samples=8, verify_samples=8)
    run = RunOptions(device="cpu")
    path.write_text(dumps(profile("demo", tp=4, data="demo", text=text, strategies=["block_drop"], run=run)))
    return path


def correct(logits_of, tokenizer, document: dict) -> bool:
    """Is the likeliest choice the right one? One choice at a time, its tokens' log-probabilities summed."""
    scores = []
    before = len(tokenizer(document["story"]).input_ids)
    for choice in document["choices"]:
        ids = torch.tensor([tokenizer(document["story"] + " " + choice).input_ids])
        with torch.no_grad():
            log_p = logits_of(ids)[0].log_softmax(-1)
        scores.append(sum(log_p[i - 1, ids[0, i]].item() for i in range(before, ids.shape[1])))
    return scores.index(max(scores)) == document["label"]


def test_a_plan_is_verified_on_the_documents_it_was_not_chosen_by(spd, demo_profile, tmp_path):
    out = tmp_path / "plan.json"
    run = spd("plan", demo_profile, "--max-accuracy-drop", "100%", "--tasks", ",".join(TASKS), "--include-path",
              tasks_dir(), "--limit", LIMIT, "-o", out, "--device", "cpu")  # fmt: skip
    assert run.code == 0, run.err
    plan = read(Plan, out)
    assert plan.budget.tasks == list(TASKS) and plan.budget.kind == "max_accuracy_drop"
    assert len(plan.drops) == 8  # nothing can break this budget

    tokenizer, dense = AutoTokenizer.from_pretrained(model_dir()), AutoModelForCausalLM.from_pretrained(model_dir())
    lm = open_session(str(model_dir()), 4).load()
    hurt = False
    for task, name in TASKS.items():
        lines = (tasks_dir() / f"{name}.jsonl").read_text().splitlines()
        others = [json.loads(line) for line in lines[1:LIMIT:2]]
        with lm.running(Drops.of_blocks([Strategy.BLOCK_DROP] * 8)):
            lost = [
                correct(lambda ids: dense(ids).logits, tokenizer, d) - correct(lm, tokenizer, d) for d in others
            ]  # one call a choice
        hurt = hurt or any(lost)
        assert plan.verified.task_accuracy_drop[task] == pytest.approx(statistics.mean(lost))
        error = statistics.stdev(lost) / math.sqrt(len(lost))
        assert plan.verified.task_accuracy_drop_stderr[task] == pytest.approx(error)
    assert hurt, "all zeros would prove nothing"
    assert task in run.err and "documents not used to choose" in " ".join(run.err.split())


def test_a_tight_budget_keeps_block_0(spd, demo_profile, tmp_path):
    out = tmp_path / "plan.json"
    run = spd("plan", demo_profile, "--max-accuracy-drop", "5%", "--tasks", "spd_demo_where", "--include-path",
              tasks_dir(), "--limit", 40, "-o", out, "--device", "cpu")  # fmt: skip
    assert run.code == 0, run.err
    plan = read(Plan, out)
    assert plan.drops and 0 not in plan.drops.blocks("attention")
    assert cost(plan.budget, plan.verified) <= 0.05


def test_the_mean_over_tasks_and_its_error():
    budget = Budget(kind="max_accuracy_drop", value=0.02, strategies=[Strategy.BLOCK_DROP], tasks=["a", "b"])
    zeros = dict.fromkeys(Comparison.model_fields, 0.0) | {
        "ppl": 1.0,
        "tokens": 1,
        "sequences": 1,
        "accuracy_drop": 9.0,
        "per_text": [],
    }
    found = Comparison(**zeros | {"task_accuracy_drop": {"a": 0.03, "b": -0.01},
                                  "task_accuracy_drop_stderr": {"a": 0.003, "b": 0.004}})  # fmt: skip
    assert cost(budget, found) == pytest.approx(0.01) and stderr(budget, found) == pytest.approx(0.0025)
    assert kept(budget, found, certain=True)
    closer = found.model_copy(update={"task_accuracy_drop": {"a": 0.035, "b": -0.004}})
    assert kept(budget, closer) and not kept(budget, closer, certain=True)
    assert describe(budget) == "accuracy -2 points on a, b"


def test_what_does_not_go_together(spd, demo_profile, tmp_path):
    given = ("plan", demo_profile, "-o", tmp_path / "no.json", "--device", "cpu", "--include-path", tasks_dir())
    for options, words in (
        (("--max-kl", 1, "--tasks", "spd_demo_who"), "--tasks belongs to --max-accuracy-drop"),
        (("--max-accuracy-drop", "1%", "--tasks", "spd_demo_nobody"), "knows no task"),
        (("--max-accuracy-drop", "1%", "--tasks", "spd_demo_who", "--limit", 3), "too few documents"),
    ):
        run = spd(*given, *options)
        assert run.code == 2 and words in run.err and not (tmp_path / "no.json").exists()
