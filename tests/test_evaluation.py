"""lm-eval on planned models: against lm-eval's own `hf` model, and against the naive reference."""

import json
import math
import random
import statistics
from pathlib import Path

import pytest
import reference
import tiny
import torch
import yaml

from spd_calib.errors import InputError
from spd_calib.evaluation.options import EvalOptions
from spd_calib.formats.common import ModelRef, Provenance, TensorParallel, TextRef
from spd_calib.formats.drops import Drops, Strategy
from spd_calib.formats.files import dumps
from spd_calib.formats.plan import Budget, Plan, PlannedBlock, Predicted, Verified
from spd_calib.formats.results import TaskResult
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.parallel.session import open_session

TP, BLOCKS, DOCUMENTS = 4, 2, 10
KEEP, DROP, PLAIN = Strategy.KEEP_SYNC, Strategy.BLOCK_DROP, Strategy.PLAIN_DROP
DROPPED = ((DROP, PLAIN), (DROP, KEEP))  # attention, MLP
KINDS = ("t_choice", "t_continue", "t_rolling", "t_generate")
MEAN = {"aggregation": "mean", "higher_is_better": True}


@pytest.fixture(scope="module", autouse=True)
def quick_lm_eval(tmp_path_factory):
    """lm-eval without its own 14,000 tasks, and with a place of its own for the data it converts."""
    import datasets
    import lm_eval.tasks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        whole = lm_eval.tasks.TaskManager
        patch.setattr(lm_eval.tasks, "TaskManager", lambda **kw: whole(**{**kw, "include_defaults": False}))
        yield


@pytest.fixture(scope="module")
def model():
    """The dense model, and what the naive reference reads."""
    return tiny.build("llama", layers=BLOCKS)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    return tiny.save(model, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def lm(folder) -> TensorParallelLM:
    return open_session(str(folder), TP).load()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer(vocab=tiny.SHAPE["vocab_size"])


@pytest.fixture(scope="module")
def documents(model, tokenizer) -> list[dict]:
    """Words for all tasks; every second document's `said` is what the planned model does not say."""
    rng = random.Random(3)
    words = [w for w in tiny.WORDS if w.isalpha()]
    found = []
    for i in range(DOCUMENTS):
        text = " ".join(rng.choices(words, k=rng.randint(3, 9)))
        choices = [" ".join(rng.choices(words, k=rng.randint(1, 2))) for _ in range(3)]
        ids = torch.tensor([tokenizer.encode(text)])
        said = reference.generate(model, ids, TP, DROPPED[0], 3, DROPPED[1])[0, ids.shape[1] :].tolist()
        said = "nothing" if i % 2 else tokenizer.decode(said, skip_special_tokens=True)
        found.append({"text": text, "choices": choices, "gold": i % 3, "said": said})
    return found


@pytest.fixture(scope="module")
def tasks(documents, tmp_path_factory) -> Path:
    """A folder of tasks, one of each kind that lm-eval has, and a group."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(d) + "\n" for d in documents))
    choice = {"output_type": "multiple_choice", "doc_to_text": "{{text}}", "doc_to_target": "gold"}
    choice |= {"doc_to_choice": "choices", "metric_list": [{"metric": m, **MEAN} for m in ("acc", "acc_norm")]}
    shown = {"num_fewshot": 2, "fewshot_split": "test", "fewshot_delimiter": " . ", "target_delimiter": " "}
    filters = [{"name": name, "filter": [{"function": "take_first"}]} for name in ("whole", "again")]
    group = {"group": "t_group", "task": ["t_choice", "t_shown"]}
    group |= {"aggregate_metric_list": [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}]}
    kinds = {
        "t_choice": choice,
        "t_shown": {**choice, **shown},
        "t_continue": {
            "output_type": "loglikelihood",
            "doc_to_text": "{{text}}",
            "doc_to_target": "{{' ' + choices[0]}}",
        },
        "t_rolling": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"},
        "t_generate": {
            "output_type": "generate_until",
            "doc_to_text": "{{text}}",
            "doc_to_target": "{{said}}",
            "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 3, "do_sample": False},
            "metric_list": [{"metric": "exact_match", **MEAN}],
            "filter_list": filters,
        },
    }
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    for name, kind in kinds.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **source, **kind}))
    (folder / "t_group.yaml").write_text(yaml.safe_dump(group))
    return folder


def make_plan(ref: ModelRef, attention: tuple[Strategy, ...], mlp: tuple[Strategy, ...]) -> Plan:
    required = {name for name, field in Verified.model_fields.items() if field.is_required()}
    zeros = dict.fromkeys(required - {"text", "tokens", "sequences"}, 0.0)
    text = TextRef(source="x", seq_len=8, min_len=8, pack=False, first=0, sequences=1, tokens=8, sha256="0" * 64)
    return Plan(
        model=ref,
        tensor_parallel=TensorParallel(size=TP),
        requires=["mlp_drop"] if DROP in mlp else [],
        blocks=[
            PlannedBlock(index=i, module=f"model.layers.{i}", strategy=a, mlp_strategy=m, reason="test")  # type: ignore[arg-type]
            for i, (a, m) in enumerate(zip(attention, mlp, strict=True))
        ],
        budget=Budget(kind="max_kl", value=1.0, strategies=[DROP]),
        predicted=Predicted(kl=0.0, ppl_increase=0.0, accuracy_drop=0.0),
        verified=Verified(**{**zeros, "ppl": 1.0}, tokens=7, sequences=1, text=text),
        provenance=Provenance(command="test", seed=0, device="cpu", dtype="float32", versions={}),
    )


@pytest.fixture(scope="module")
def plan(folder) -> Plan:
    return make_plan(open_session(str(folder), TP).ref, *DROPPED)


@pytest.fixture(scope="module")
def results(lm, tokenizer, plan, tasks) -> dict[tuple[str, str], TaskResult]:
    """Every kind of task and the group, with attention and MLP sync points dropped and one written off."""
    from spd_calib.evaluation.harness import TaskSuite

    suite = TaskSuite([*KINDS, "t_group"], tasks, options=EvalOptions(batch_size=4))
    found = suite.compare(*suite.run_dense_and_planned(lm, tokenizer, drops=plan.drops))
    return {(r.task, r.metric): r for r in found}


def log_likelihood(model, tokenizer, context: str, words: str, strategies: tuple) -> float:
    """Of `words` behind `context`, by the naive reference."""
    start = tokenizer.encode(context) if context else [tokenizer.bos_token_id]
    ids = start + tokenizer.encode(words, add_special_tokens=not context)
    logits = reference.logits(model, torch.tensor([ids[:-1]]), TP, strategies[0], strategies[1])[0]
    rows = logits.log_softmax(-1)
    return sum(rows[t, ids[t + 1]].item() for t in range(len(start) - 1, len(ids) - 1))


KEPT = ((KEEP,) * BLOCKS, (KEEP,) * BLOCKS)


def test_the_dense_scores_are_those_of_lm_evals_own_model(results, folder, tasks):
    import lm_eval

    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "dtype": "float32"},
        device="cpu",
        tasks=[*KINDS, "t_shown"],
        task_manager=lm_eval.tasks.TaskManager(include_path=tasks),
        bootstrap_iters=0,
    )["results"]
    theirs = {
        (task, key.removesuffix(",none")): value
        for task, fields in found.items()
        for key, value in fields.items()
        if "," in key and "_stderr" not in key
    }
    assert set(theirs) == {key for key in results if key[0] != "t_group"}
    for key, value in theirs.items():
        assert results[key].dense == pytest.approx(value, rel=1e-5), key
        assert results[key].documents == DOCUMENTS


def test_every_metric_has_its_direction_and_an_error_where_it_is_a_mean(results):
    assert {key: r.higher_is_better for key, r in results.items() if key[0] == "t_rolling"} == {
        ("t_rolling", m): False for m in ("word_perplexity", "byte_perplexity", "bits_per_byte")
    }
    means = {key for key, r in results.items() if r.difference_stderr is not None}
    assert means == {key for key in results if "perplexity" not in key[1] and "bits" not in key[1]}
    assert {m for task, m in results if task == "t_generate"} == {"exact_match,whole", "exact_match,again"}
    assert all(r.difference == r.planned - r.dense for r in results.values())


@pytest.mark.parametrize("which", ["dense", "planned"])
def test_log_likelihoods_are_the_naive_references(results, model, tokenizer, documents, which):
    strategies = KEPT if which == "dense" else DROPPED
    sums = [log_likelihood(model, tokenizer, d["text"], d["choices"][0], strategies) for d in documents]
    assert getattr(results["t_continue", "perplexity"], which) == pytest.approx(
        math.exp(-statistics.fmean(sums)), rel=1e-4
    )
    sums = [log_likelihood(model, tokenizer, "", d["text"], strategies) for d in documents]
    words = sum(len(d["text"].split()) for d in documents)
    assert getattr(results["t_rolling", "word_perplexity"], which) == pytest.approx(
        math.exp(-sum(sums) / words), rel=1e-4
    )


def test_the_paired_error_is_the_one_computed_by_hand(results, model, tokenizer, documents):
    right: dict[tuple, list[int]] = {KEPT: [], DROPPED: []}
    for strategies, hits in right.items():
        for d in documents:
            sums = [log_likelihood(model, tokenizer, d["text"], c, strategies) for c in d["choices"]]
            hits.append(int(sums.index(max(sums)) == d["gold"]))
    differences = [p - d for p, d in zip(right[DROPPED], right[KEPT], strict=True)]
    assert any(differences)
    r = results["t_choice", "acc"]
    assert r.difference == pytest.approx(statistics.fmean(differences))
    assert r.difference_stderr == pytest.approx(statistics.stdev(differences) / math.sqrt(DOCUMENTS))


def test_a_group_is_the_mean_of_its_tasks(results):
    parts, group = [results[task, "acc"] for task in ("t_choice", "t_shown")], results["t_group", "acc"]
    assert group.documents == 2 * DOCUMENTS
    assert group.planned == pytest.approx(statistics.fmean(p.planned for p in parts))
    assert group.difference_stderr == pytest.approx(math.hypot(*(p.difference_stderr for p in parts)) / 2)


def test_generation_is_the_naive_references(results):
    """Of left-padded prompts in batches, with a KV cache; every second document asks for what is not said."""
    assert results["t_generate", "exact_match,whole"].planned == 0.5


@pytest.mark.parametrize("family", ["gemma", "opt", "qwen3"])
def test_a_plan_that_keeps_everything_changes_nothing(family, tokenizer, tasks):
    """Families whose output head is tied to the embedding, which lm-eval ties anew."""
    from spd_calib.evaluation.harness import TaskSuite

    lm = TensorParallelLM.simulated(tiny.build(family, layers=BLOCKS), TP)
    ref = ModelRef(id="x", architecture="x", num_blocks=BLOCKS, config_hash="0" * 64, weight_fingerprint="0" * 64)
    ids = tiny.tokens(2, 8)
    before = lm(ids)
    suite = TaskSuite(KINDS, tasks, options=EvalOptions(limit=4, batch_size=4))
    for r in suite.compare(*suite.run_dense_and_planned(lm, tokenizer, drops=make_plan(ref, *KEPT).drops)):
        assert abs(r.difference) <= 1e-6 and not r.difference_stderr and r.documents == 4
    assert torch.equal(lm(ids), before)


def test_a_suite_is_run_again_and_again_on_the_same_requests(lm, tokenizer, tasks, results, capsys):
    from spd_calib.evaluation.harness import TaskSuite

    suite, told = TaskSuite(["t_choice", "t_shown", "t_generate"], tasks, options=EvalOptions(batch_size=4)), []
    dense = suite.accuracy(lm, tokenizer)
    assert dense == {
        task: results[task, metric].dense
        for task, metric in (("t_choice", "acc"), ("t_shown", "acc"), ("t_generate", "exact_match,whole"))
    }
    with lm.running(Drops.of_blocks(*DROPPED)):
        planned = suite.run(lm, tokenizer, note=told.append)
    assert {key: s.value for key, s in planned.scores.items()} == {key: results[key].planned for key in planned.scores}
    assert suite.accuracy(lm, tokenizer) == dense
    assert not planned.truncated
    assert told[-1] == f"{suite.requests} of {suite.requests} requests"
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("names", "folder_name", "limit", "words"),
    [
        (["t_chioce"], "", None, ["'t_chioce'", "perhaps t_choice", "lm-eval ls tasks", "folder to include"]),
        (["t_choice"], "nowhere", None, ["nowhere"]),
        (["t_choice"], "", 0, ["limit of 0"]),
        ([" "], "", None, ["No task"]),
    ],
)
def test_bad_input_is_one_sentence(tasks, names, folder_name, limit, words):
    from spd_calib.evaluation.harness import TaskSuite

    with pytest.raises(InputError) as e:
        TaskSuite(names, tasks / folder_name, options=EvalOptions(limit=limit))
    assert all(word in str(e.value) for word in words) and "\n" not in str(e.value)


def test_data_out_of_reach_is_one_sentence(tasks, monkeypatch):
    import datasets

    from spd_calib.evaluation.harness import TaskSuite

    def closed(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'x' on the Hub (ConnectError)\nand more")

    monkeypatch.setattr(datasets, "load_dataset", closed)
    with pytest.raises(InputError, match=r"t_choice cannot be reached .*network") as e:
        TaskSuite(["t_choice"], tasks)
    assert "\n" not in str(e.value)


def test_requests_too_long_for_the_model_are_noticed(lm, tokenizer, tasks, documents, tmp_path):
    from spd_calib.evaluation.harness import TaskSuite

    long = yaml.safe_load((tasks / "t_continue.yaml").read_text())
    long |= {"task": "t_context", "doc_to_text": "{{text}} " * 50}
    (tmp_path / "t_context.yaml").write_text(yaml.safe_dump(long))
    suite = TaskSuite(["t_context"], tmp_path, options=EvalOptions(limit=2, batch_size=2))
    assert suite.run(lm, tokenizer).truncated


def test_a_task_without_accuracy_and_one_that_asks_too_much(lm, tokenizer, tasks, tmp_path):
    from spd_calib.evaluation.harness import TaskSuite

    with pytest.raises(InputError, match="t_rolling has no accuracy"):
        TaskSuite(["t_rolling"], tasks, options=EvalOptions(limit=2)).accuracy(lm, tokenizer)
    greedy = yaml.safe_load((tasks / "t_generate.yaml").read_text())
    greedy |= {"task": "t_long", "generation_kwargs": {"until": ["."], "max_gen_toks": 128}}
    (tmp_path / "t_long.yaml").write_text(yaml.safe_dump(greedy))
    with pytest.raises(InputError, match=r"t_long.*128"):
        TaskSuite(["t_long"], tmp_path, options=EvalOptions(limit=2)).accuracy(lm, tokenizer)


def test_lm_evals_command_line_runs_a_plan(plan, folder, tasks, results, tmp_path, capsys):
    from spd_calib.evaluation.lm_eval_model import run_command_line

    named = plan.model_copy(update={"model": plan.model.model_copy(update={"id": "demo"})})
    (tmp_path / "plan.json").write_text(dumps(named))
    arguments = ["run", "--model", "spd_calib", "--tasks", ",".join(KINDS), "--include_path", str(tasks)]
    arguments += ["--output_path", str(tmp_path / "out"), "--log_samples", "--batch_size", "4"]
    arguments += ["--model_args", f"plan={tmp_path / 'plan.json'},device=cpu"]
    assert run_command_line(arguments, lambda model, plan: {"demo": str(folder)}[model]) == 0
    assert "|t_choice" in capsys.readouterr().out
    written = json.loads(next((tmp_path / "out/demo").glob("results_*.json")).read_text())
    for task, metric in (("t_choice", "acc,none"), ("t_rolling", "bits_per_byte,none"), ("t_continue", "acc,none")):
        expected = results[task, metric.removesuffix(",none")].planned
        assert written["results"][task][metric] == pytest.approx(expected, rel=1e-5)
    assert written["results"]["t_generate"]["exact_match,whole"] == 0.5
    assert written["config"]["spd_calib"]["tensor_parallel"] == {"size": TP}
    assert len(list((tmp_path / "out").rglob("samples_*.jsonl"))) == len(KINDS)


def test_lm_evals_command_line_refuses_in_one_sentence(plan, llama, tasks, tmp_path, capsys):
    from spd_calib.evaluation.lm_eval_model import run_command_line

    (tmp_path / "plan.json").write_text(dumps(plan))
    common = ["run", "--model", "spd_calib", "--tasks", "t_choice", "--include_path", str(tasks), "--model_args"]
    for given, words in (
        ("pretrained=x", "needs a plan"),
        (f"plan={tmp_path / 'none.json'}", "no file"),
        (f"plan={tmp_path / 'plan.json'},pretrained={llama}", "is not the model"),
        (f"plan={tmp_path / 'plan.json'},peft=x", "takes no argument 'peft'"),
        (f"plan={tmp_path / 'plan.json'},dtype=int8", "dtype=int8"),
    ):
        with pytest.raises(InputError, match=words):
            run_command_line([*common, given])
    with pytest.raises(InputError, match="Tasks not found"):
        run_command_line(["run", "--model", "spd_calib", "--tasks", "t_none", "--model_args", "plan=x"])
    assert run_command_line(["validate", "--tasks", "t_choice", "--include_path", str(tasks)]) == 0
    assert run_command_line(["validate", "--tasks", "t_none"]) == 1
    assert run_command_line(["run", "--nonsense"]) == 2
    assert run_command_line(["ls", "tasks", "--include_path", str(tasks)]) == 0
    assert "t_generate" in capsys.readouterr().out
