"""The embedded default: small, disjoint, balanced, and what its script's seeds say it is."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from spd_calib.demo import assets

RECIPE = Path(__file__).parents[1] / "recipes" / "demo_model"
KINDS = ("where", "who", "count")


@pytest.fixture(scope="module")
def recipe():
    """The recipe's two light modules; the training script is not needed to make the text again."""
    sys.path.insert(0, str(RECIPE))
    try:
        import tasks
        import world

        yield world, tasks
    finally:
        sys.path.remove(str(RECIPE))
        for name in ("world", "tasks"):
            sys.modules.pop(name, None)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def documents(kind: str) -> list[dict]:
    return rows(assets.tasks_dir() / f"{kind}.jsonl")


def test_all_that_ships_is_under_eight_megabytes():
    assert sum(f.stat().st_size for f in assets.HERE.rglob("*") if f.is_file()) < 8e6


def test_a_story_is_a_function_of_its_split_and_number(recipe):
    world, _ = recipe
    assert world.story("train", 3).text == world.story("train", 3).text
    assert len({world.story(split, number).text for split in ("train", "heldout") for number in range(50)}) == 100


def test_the_shipped_text_is_what_the_seeds_give(recipe):
    world, tasks = recipe
    for split in ("calibration", "heldout"):
        shipped = [row["text"] for row in rows(assets.data_file(split))]
        assert shipped == [world.story(split, number).text for number in range(len(shipped))]
    for kind in KINDS:
        assert documents(kind) == tasks.documents(kind)


def test_calibration_heldout_and_tasks_share_no_story():
    calibration, heldout = ([row["text"] for row in rows(assets.data_file(n))] for n in ("calibration", "heldout"))
    begun = {doc["story"][:200] for kind in KINDS for doc in documents(kind)}
    assert len({*calibration, *heldout}) == len(calibration) + len(heldout) == 600
    assert not any(text.startswith(story) for text in [*calibration, *heldout] for story in begun)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_balanced(kind, recipe):
    _, tasks = recipe
    docs = documents(kind)
    assert len(docs) == 200 and all(len(set(doc["choices"])) == 4 for doc in docs)
    assert Counter(doc["label"] for doc in docs) == dict.fromkeys(range(4), 50)
    answers = Counter(doc["choices"][doc["label"]].split()[-1] for doc in docs)
    assert max(answers.values()) <= 200 / len(tasks.ANSWERS[kind]) + 1


def test_choices_differ_in_one_last_token():
    """So that lm-eval scores a document's four choices with one forward pass."""
    tokenizer = AutoTokenizer.from_pretrained(assets.model_dir())
    for kind in KINDS:
        for doc in documents(kind):
            ids = [tokenizer(f"{doc['story']} {choice}")["input_ids"] for choice in doc["choices"]]
            assert len({tuple(row[:-1]) for row in ids}) == 1 and len({row[-1] for row in ids}) == 4


def test_the_model_loads_in_plain_transformers_and_knows_its_world():
    model = AutoModelForCausalLM.from_pretrained(assets.model_dir(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(assets.model_dir())
    config = model.config
    assert config.num_hidden_layers >= 8 and config.num_attention_heads == 8 and config.num_key_value_heads >= 4
    assert not any(width % 8 for width in (config.hidden_size, config.intermediate_size, config.vocab_size))
    texts = [row["text"] for row in rows(assets.data_file("heldout"))[:8]]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    assert all(row[0] == tokenizer.bos_token_id and row.count(row[0]) == 1 for row in ids)
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == texts[0]
    full = torch.tensor([row[:96] for row in ids if len(row) >= 96])
    with torch.no_grad():
        loss = model(input_ids=full, labels=full).loss.item()
    assert loss < 1.1  # what is left is mostly what the world's dice decide; 1.2 without looking back


def test_the_kept_scores_are_above_ninety_percent():
    summary = json.loads((RECIPE.parents[1] / "results/demo/training/summary.json").read_text(encoding="utf-8"))
    assert set(summary["tasks"]) == set(assets.TASKS)
    assert all(task["acc"] >= 0.9 for task in summary["tasks"].values())
