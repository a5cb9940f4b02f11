"""`eval` beside `lm_eval --model hf`: of the dense model the same prompts and answers, document by document."""

import json
import random
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import plans
import pytest
import yaml

from spd_calib.api.evaluate import evaluate as run_tasks
from spd_calib.api.options import RunOptions
from spd_calib.api.progress import Progress
from spd_calib.api.tasks import TaskOptions
from spd_calib.demo.assets import model_dir
from spd_calib.errors import InputError
from spd_calib.evaluation import portions
from spd_calib.evaluation.options import (
    EvalOptions,
    Seeds,
    parse_arguments,
    parse_batch_size,
    parse_bool,
    parse_limit,
    parse_samples,
    parse_seeds,
)
from spd_calib.formats.files import check_writable, dumps, read, write_text
from spd_calib.formats.results import Results

DOCUMENTS, SHOWN = 12, 9
TASKS = ("e_choice", "e_generate", "e_rolling")
ATTENTION = ["keep_sync", "keep_sync", *["block_drop"] * 6]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' is: ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant is: The' }}{% endif %}"
)


class Counting:
    """Counts the steps of a run, as a bar does, and tells `told` of each: done, in all, words."""

    def __init__(self, told):
        self.told, self.done, self.total = told, 0, 0

    def expect(self, steps: int) -> None:
        self.total += steps

    def step(self, words: str) -> None:
        self.done += 1
        self.told(self.done, max(self.done, self.total), words)


def evaluate(
    plan, *, tasks, output, include_path=None, options=None, log_samples=None, dtype=None, say=None, progress=None
):
    """What the command `eval` does, without a terminal: a journal beside the output until that is written."""
    counting = Counting(progress or (lambda *_: None))
    check_writable({"results": output})
    journal = output.with_name(output.name + ".journal")
    results = run_tasks(
        plan,
        tasks=TaskOptions.of(tasks, include_path, options=options),
        journal=journal,
        log_samples=log_samples,
        run=RunOptions("cpu", dtype),
        progress=Progress(say=say or (lambda words: None), expect=counting.expect, step=counting.step),
    )
    write_text(output, dumps(results))
    journal.unlink(missing_ok=True)
    return results


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
def folder(tmp_path_factory) -> Path:
    """The demo's model, and a chat template in its tokenizer."""
    found = Path(shutil.copytree(model_dir(), tmp_path_factory.mktemp("chat") / "model"))
    config = json.loads((found / "tokenizer_config.json").read_text())
    (found / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    return found


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """Made up in the demo's world: a choice and a continuation with examples to show, and whole texts."""
    folder = tmp_path_factory.mktemp("tasks")
    rng = random.Random(5)
    for split, n in (("train", SHOWN), ("test", DOCUMENTS)):
        lines = []
        for _ in range(n):
            who, what = rng.choice(["Tom", "Jane", "Max", "Ruth"]), rng.choice(["kite", "boat", "doll"])
            places = rng.sample(["in a shed", "in a barn", "in a bag", "in a tent"], 3)
            text = f"The {what} is {places[0]}. {who} is tired. Where is the {what}?"
            lines.append({"text": text, "choices": [f"The {what} is {p}" for p in places], "gold": rng.randrange(3)})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = {split: str(folder / f"{split}.jsonl") for split in ("train", "test")}
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test"}
    shown = {"training_split": "train", "fewshot_delimiter": "\n", "description": "Say where.\n"}
    kinds = {
        "e_choice": {
            **shown,
            "output_type": "multiple_choice",
            "doc_to_text": "{{text}}",
            "doc_to_target": "gold",
            "doc_to_choice": "choices",
        },
        "e_generate": {
            **shown,
            "output_type": "generate_until",
            "doc_to_text": "{{text}}",
            "doc_to_target": "{{choices[gold]}}",
            "generation_kwargs": {"until": ["."], "max_gen_toks": 12, "do_sample": False},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        },
        "e_rolling": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "num_fewshot": 0,
        },
    }
    for name, kind in kinds.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **source, **kind}))
    return folder


@pytest.fixture(scope="module")
def plan(folder, tmp_path_factory) -> Path:
    return plans.write_plan(tmp_path_factory.mktemp("plan") / "plan.json", folder, 4, ATTENTION)


@dataclass(frozen=True)
class Case:
    """Our options beside lm-eval's own."""

    options: EvalOptions
    theirs: dict = field(default_factory=dict)


def case(**given) -> Case:
    return Case(EvalOptions(**given), given)


CASES = {
    "defaults": case(),
    "five shown": case(num_fewshot=5),
    "chat": case(apply_chat_template=True),
    "chat, five shown": case(num_fewshot=5, apply_chat_template=True),
    "chat, five in one turn": case(num_fewshot=5, apply_chat_template=True, fewshot_as_multiturn=False),
    "system, no chat": case(num_fewshot=1, system_instruction="Be brief."),
    "system and chat": case(system_instruction="Be brief.", apply_chat_template=True),
    "sampled": case(gen_kwargs={"do_sample": True, "temperature": 1.0, "max_gen_toks": 6}),
    "seeds": Case(
        EvalOptions(num_fewshot=3, seeds=Seeds(7, 8, 9, 10)),
        {
            "num_fewshot": 3,
            "random_seed": 7,
            "numpy_random_seed": 8,
            "torch_random_seed": 9,
            "fewshot_random_seed": 10,
        },
    ),
    "some documents": case(samples={"e_choice": [1, 5], "e_generate": [0, 4], "e_rolling": [2, 3, 11]}),
    "a share": case(limit=0.3),
}


def lm_evals_own(folder: Path, tasks: Path, batch_size: int = 8, **given) -> dict[str, list[dict]]:
    """What lm-eval's command line gives with its model `hf`."""
    import lm_eval

    # the command line's rule, see EvaluatorConfig: with a chat template, examples are turns
    given.setdefault("fewshot_as_multiturn", given.get("apply_chat_template", False))
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "dtype": "float32"},
        device="cpu",
        batch_size=batch_size,
        tasks=list(TASKS),
        task_manager=lm_eval.tasks.TaskManager(include_path=tasks),
        bootstrap_iters=0,
        **given,
    )
    return found["samples"]


def ours(plan: Path, tasks: Path, out: Path, options: EvalOptions, **more) -> tuple[Results, dict[str, list[dict]]]:
    results = evaluate(
        plan, tasks=TASKS, output=out / "r.json", include_path=tasks, options=options, log_samples=out / "log", **more
    )
    logged = {name: (out / "log" / f"samples_{name}.jsonl").read_text().splitlines() for name in TASKS}
    return results, {name: list(map(json.loads, lines)) for name, lines in logged.items()}


@pytest.mark.parametrize("name", CASES)
def test_every_document_of_the_dense_model_is_lm_evals(name, folder, tasks, plan, tmp_path):
    results, logged = ours(plan, tasks, tmp_path, CASES[name].options)
    theirs = lm_evals_own(folder, tasks, **CASES[name].theirs)
    differing = 0
    for task in TASKS:
        assert len(logged[task]) == len(theirs[task]) > 1
        for mine, their in zip(logged[task], theirs[task], strict=True):
            for key in ("doc_id", "doc", "target", "doc_hash", "prompt_hash", "target_hash"):
                assert mine[key] == their[key]
            assert mine["arguments"] == json.loads(json.dumps(their["arguments"]))  # prompts and generation arguments
            differing += mine["dense"]["resps"] != mine["planned"]["resps"]
            if task == "e_generate":
                assert mine["dense"]["resps"] == their["resps"]
                assert mine["dense"]["exact_match"] == their["exact_match"]
            elif task == "e_choice":
                for (log_p, greedy), their_answer in zip(
                    mine["dense"]["filtered_resps"], their["filtered_resps"], strict=True
                ):
                    assert log_p == pytest.approx(their_answer[0], abs=2e-4) and greedy == their_answer[1]
                assert mine["dense"]["acc"] == their["acc"]
            else:
                assert mine["dense"]["filtered_resps"] == pytest.approx(their["filtered_resps"], abs=2e-4)
    said = [mine["dense"]["resps"][0][0] for mine in logged["e_generate"]]
    assert len(set(said)) > 1, "one answer to everything would prove nothing"
    assert differing, "a plan that changes nothing would prove nothing of which model is which"
    assert read(Results, tmp_path / "r.json") == results and not (tmp_path / "r.json.journal").exists()
    described, options = results.lm_eval, CASES[name].options
    assert described and described.seeds.model_dump() == asdict(options.seeds)
    assert described.gen_kwargs == options.gen_kwargs and described.num_fewshot == options.num_fewshot
    assert (described.chat_template_sha256 is not None) == options.apply_chat_template
    assert {r.task: r.num_fewshot for r in results.tasks} == dict.fromkeys(TASKS, options.num_fewshot or 0) | {
        "e_rolling": 0
    }


class Killed(BaseException):
    """What ends a run in its middle."""


def killed_after(requests: int):
    def progress(done: int, total: int, words: str) -> None:
        if done > requests:
            raise Killed

    return progress


def counted(monkeypatch) -> list[int]:
    """The number of sequences in every forward of a model by lm-eval from now on, or of rows with one context."""
    from lm_eval.models.huggingface import HFLM

    from spd_calib.evaluation.shared_contexts import _Sharing

    seen: list[int] = []
    call, generate, answered = HFLM._model_call, HFLM._model_generate, _Sharing._answered

    def counting_call(self, inps, *args, **kwargs):
        seen.append(len(inps))
        return call(self, inps, *args, **kwargs)

    def counting_generate(self, context, *args, **kwargs):
        seen.append(len(context))
        return generate(self, context, *args, **kwargs)

    def counting_answered(self, rows):
        seen.append(len(rows))
        return answered(self, rows)

    monkeypatch.setattr(_Sharing, "_answered", counting_answered)
    monkeypatch.setattr(HFLM, "_model_call", counting_call)
    monkeypatch.setattr(HFLM, "_model_generate", counting_generate)
    return seen


@pytest.mark.parametrize(("batch_size", "sampled"), [(4, False), (4, True), ("auto", False)])
def test_a_killed_run_goes_on_to_the_same_bits(batch_size, sampled, tasks, plan, tmp_path, monkeypatch):
    monkeypatch.setattr(portions, "LEAST", 8)
    monkeypatch.setattr(portions, "BATCHES", 1)
    options = EvalOptions(
        batch_size=batch_size,
        max_batch_size=4,
        model_args={"max_length": 64},  # trying for a batch size takes many forwards of as many tokens
        gen_kwargs={"do_sample": True, "temperature": 1.0} if sampled else {},
    )
    seen = counted(monkeypatch)
    (tmp_path / "whole").mkdir()
    whole = ours(plan, tasks, tmp_path / "whole", options)
    whole_bytes = (tmp_path / "whole/r.json").read_bytes()
    alone, total = sum(seen), 2 * DOCUMENTS * 5  # three choices, a continuation and a text a document
    for kill in (DOCUMENTS, total // 2 + 10, total - 2):
        with pytest.raises(Killed):
            ours(plan, tasks, tmp_path, options, progress=killed_after(kill))
        assert not (tmp_path / "r.json").exists() and (tmp_path / "r.json.journal").exists()
    seen.clear()
    told: list[str] = []
    steps: list[tuple[int, int]] = []
    resumed = ours(
        plan, tasks, tmp_path, options, say=told.append, progress=lambda done, total, _: steps.append((done, total))
    )
    assert any(words.startswith("going on from") for words in told) and 0 < sum(seen) < alone / 2
    assert steps[-1] == (total, total)
    assert (tmp_path / "r.json").read_bytes() == whole_bytes and resumed == whole
    assert not (tmp_path / "r.json.journal").exists()


def test_a_journal_of_another_run_is_refused(tasks, plan, tmp_path):
    with pytest.raises(Killed):
        ours(plan, tasks, tmp_path, EvalOptions(), progress=killed_after(DOCUMENTS * 3 + 1))
    for number, (options, dtype, words) in enumerate(
        (
            (EvalOptions(num_fewshot=1), None, "list of requests differs"),
            (EvalOptions(batch_size=2), None, "way of running lm-eval differs"),
            (EvalOptions(model_args={"softmax_dtype": "bfloat16"}), None, "way of running lm-eval differs"),
            (EvalOptions(), "bfloat16", "device, dtype or number of real ranks differs"),
        )
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        shutil.copy(tmp_path / "r.json.journal", folder)
        with pytest.raises(InputError, match=words):
            ours(plan, tasks, folder, options, dtype=dtype)


def test_in_bfloat16_log_probabilities_are_rounded_as_lm_eval_rounds_them(folder, tasks, plan, tmp_path):
    """And in float32 where one asks for it, in lm-eval's words."""

    def log_probabilities(**given) -> list[float]:
        _, logged = ours(plan, tasks, tmp_path, EvalOptions(**given), dtype="bfloat16")
        return [answer[0] for line in logged["e_choice"] for answer in line["dense"]["filtered_resps"]]

    import torch

    def is_rounded(values: list[float]) -> bool:
        found = torch.tensor(values, dtype=torch.float64)
        return torch.equal(found, found.bfloat16().double())

    assert is_rounded(log_probabilities())
    assert not is_rounded(log_probabilities(model_args={"softmax_dtype": "float32"}))


def test_the_log_in_one_file(tasks, plan, tmp_path):
    log = tmp_path / "log.jsonl"
    evaluate(
        plan,
        tasks=TASKS,
        output=tmp_path / "r.json",
        include_path=tasks,
        options=EvalOptions(limit=2),
        log_samples=log,
    )
    assert [json.loads(line)["task"] for line in log.read_text().splitlines()] == [t for t in TASKS for _ in range(2)]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: EvalOptions(limit=0), "limit of 0"),
        (lambda: EvalOptions(limit=1.5), "limit of 1.5"),
        (lambda: EvalOptions(limit=float("nan")), "limit of nan"),
        (lambda: EvalOptions(limit=2, samples={"t": [0]}), "leave one out"),
        (lambda: EvalOptions(num_fewshot=-1), "-1 few-shot examples"),
        (lambda: EvalOptions(fewshot_as_multiturn=True), "need the chat template"),
        (lambda: EvalOptions(batch_size=0), "batch of 0"),
        (lambda: EvalOptions(model_args={"peft": "x"}), "no argument 'peft'"),
        (lambda: parse_arguments("temperature", "generation arguments"), "neither key=value"),
        (lambda: parse_arguments('{"a": 1', "generation arguments"), "neither key=value"),
        (lambda: parse_arguments("temperature=inf", "generation arguments"), "neither key=value"),
        (lambda: parse_seeds("1,2"), "seed '1,2'"),
        (lambda: parse_seeds("None"), "seed 'None'"),
        (lambda: parse_seeds("-1"), "seed '-1'"),
        (lambda: parse_limit("many"), "limit 'many'"),
        (lambda: parse_bool("maybe", "fewshot_as_multiturn"), "fewshot_as_multiturn is 'maybe'"),
        (lambda: parse_batch_size("auto:4"), "batch size 'auto:4'"),
        (lambda: parse_samples('{"t": []}'), "no JSON object"),
        (lambda: parse_samples("[1]"), "no JSON object"),
        (lambda: parse_samples("nowhere.json"), "no JSON object"),
    ],
)
def test_an_option_that_cannot_be_used_is_one_sentence(make, words):
    with pytest.raises(InputError, match=words) as e:
        make()
    assert "\n" not in str(e.value)


def test_options_are_read_as_lm_evals_command_line_reads_them():
    from lm_eval._cli.harness import HarnessCLI

    def theirs(*argv: str):
        parser = HarnessCLI()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["lm-eval", "run", "--tasks", "t", *argv])
            return parser.parse_args()

    for text in ('temperature=0.8,do_sample=True,until=["a","b"]', '{"top_k": 5}', "max_gen_toks=8", "x=1,y=z"):
        assert parse_arguments(text, "x") == theirs("--gen_kwargs", text).gen_kwargs
    for text in ("42", "1,2,3,4", "1,2,3"):
        assert list(asdict(parse_seeds(text)).values()) == theirs("--seed", text).seed
    assert parse_arguments(None, "x") == {} and parse_limit(None) is None and parse_samples(None) is None
    assert (parse_limit("3"), parse_limit("0.5"), parse_bool("True", "x"), parse_bool("false", "x")) == (
        3,
        0.5,
        True,
        False,
    )


def test_what_the_tasks_do_not_bear_is_one_sentence(tasks, plan, tmp_path):
    def run(options: EvalOptions, names=("e_choice",), **more):
        evaluate(plan, tasks=names, output=tmp_path / "r.json", include_path=tasks, options=options, **more)

    for options, words in (
        (EvalOptions(samples={"e_choice": [0, DOCUMENTS]}), f"{DOCUMENTS} documents, and none of index {DOCUMENTS}"),
        (EvalOptions(samples={"e_rolling": [0]}), "none of the tasks e_choice"),
        (EvalOptions(num_fewshot=SHOWN + 1), "requests of task e_choice cannot be built"),
    ):
        with pytest.raises(InputError, match=words):
            run(options)
    with pytest.raises(InputError, match="No documents are named of the task e_rolling"):
        run(EvalOptions(samples={"e_choice": [0]}), ("e_choice", "e_rolling"))
    with pytest.raises(InputError, match="No documents are named of the task e_choice"):
        run(EvalOptions(samples={"e_choice": []}))
    with pytest.raises(InputError, match=r"A batch of 7\.0 requests cannot be run"):
        EvalOptions(batch_size=7.0)
    bare = plans.write_plan(tmp_path / "bare.json", model_dir(), 4, ATTENTION)
    with pytest.raises(InputError, match="no chat template"):
        evaluate(
            bare,
            tasks=["e_choice"],
            output=tmp_path / "r.json",
            include_path=tasks,
            options=EvalOptions(apply_chat_template=True),
        )
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="no folder for the log"):
        run(EvalOptions(), log_samples=tmp_path / "file")
    with pytest.raises(InputError, match="does not exist"):
        run(EvalOptions(), log_samples=tmp_path / "no" / "log.jsonl")
    assert not (tmp_path / "r.json").exists()


def test_the_zero_of_a_tasks_own_is_kept_and_said(tasks, plan, tmp_path):
    told: list[str] = []
    results, _ = ours(plan, tasks, tmp_path, EvalOptions(num_fewshot=1, limit=2), say=told.append)
    assert "e_rolling" in told[0] and {r.task: r.num_fewshot for r in results.tasks}["e_rolling"] == 0


def test_both_spellings_of_the_command_line(spd, folder, tasks, tmp_path):
    plan = plans.write_plan(tmp_path / "plan.json", folder, 4, ATTENTION)
    common = ("eval", plan, "--tasks", "e_generate", "--device", "cpu")
    written = []
    for number, more in enumerate(
        (
            ("--include_path", tasks, "--num_fewshot", 5, "--apply_chat_template", "--fewshot_as_multiturn", "false",
             "--system_instruction", "Be brief.", "--gen_kwargs", "max_gen_toks=4", "--batch_size", "auto",
             "--max_batch_size", 2, "--log_samples", tmp_path / "log", "--limit", "0.5"),
            ("--include-path", tasks, "--num-fewshot", 5, "--apply-chat-template", "--fewshot-as-multiturn", "false",
             "--system-instruction", "Be brief.", "--gen-kwargs", '{"max_gen_toks": 4}', "--batch-size", "auto",
             "--max-batch-size", 2, "--log-samples", tmp_path / "log", "--limit", "0.5", "--seed", "0,1234,1234,1234"),
        )
    ):  # fmt: skip
        outcome = spd(*common, *more, "-o", tmp_path / f"{number}.json")
        assert outcome.code == 0, outcome.err
        written.append(read(Results, tmp_path / f"{number}.json"))
    assert written[0].model_dump(exclude={"provenance"}) == written[1].model_dump(exclude={"provenance"})
    described = written[0].lm_eval
    assert described and described.gen_kwargs == {"max_gen_toks": 4} and not described.fewshot_as_multiturn
    assert written[0].limit == 0.5 and written[0].tasks[0].documents == DOCUMENTS // 2
    lines = (tmp_path / "log/samples_e_generate.jsonl").read_text().splitlines()
    assert len(lines) == DOCUMENTS // 2 and "system is: Be brief." in lines[0]


def test_the_cache_of_responses_knows_the_plan(folder, tasks, tmp_path, capsys):
    """lm-eval's keys are the requests alone: the second plan once got the first one's scores."""
    from spd_calib.evaluation.lm_eval_model import run_command_line

    def run(name: str, strategies: list[str], *more: str) -> dict[str, float]:
        plan = plans.write_plan(tmp_path / "plan.json", folder, 4, strategies)
        out = tmp_path / name
        given = ["run", "--model", "spd_calib", "--model_args", f"plan={plan},device=cpu", "--tasks", "e_rolling"]
        given += ["--include_path", str(tasks), "--output_path", str(out), *more]
        assert run_command_line(given) == 0
        capsys.readouterr()
        inside = out / str(folder).replace("/", "__")  # lm-eval's name for the model's folder
        return json.loads(next(inside.glob("results_*.json")).read_text())["results"]["e_rolling"]

    cache = ("--use_cache", str(tmp_path / "cache"))
    other = ["block_drop"] * 8
    alone = [run(f"alone{i}", strategies) for i, strategies in enumerate((ATTENTION, other))]
    assert alone[0] != alone[1]
    assert [run(f"cached{i}", strategies, *cache) for i, strategies in enumerate((ATTENTION, other))] == alone
    with pytest.MonkeyPatch.context() as patch:
        seen = counted(patch)
        assert [run(f"again{i}", strategies, *cache) for i, strategies in enumerate((ATTENTION, other))] == alone
        assert not seen, "nothing is computed again"
        assert run("third", ["keep_sync"] * 8, *cache) not in alone and seen
