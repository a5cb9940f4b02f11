"""What docs/security.md promises: nothing that comes with a file or a model is run, written elsewhere or taken at its
word about its size."""

import ast
import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import plans
import pytest
import tiny

ROOT = Path(__file__).parents[1]
MEMORY = 2 * 2**30  # beyond what the process has when it begins


class Marker:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def folder(llama, tmp_path) -> Path:
    """A copy of the tiny Llama's folder, to spoil."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


@pytest.fixture
def marker(tmp_path) -> Path:
    return tmp_path / "it-was-run"


def change_json(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def profile(spd, folder, text, tmp_path):
    options = ["--tp", 2, "--data", text, "--seq-len", 16, "--max-samples", 4, "--verify-samples", 2]
    return spd("profile", folder, *options, "--strategy", "block_drop", "-o", tmp_path / "p.json")


def code_that_marks(marker: Path) -> str:
    return (
        f"open({str(marker)!r}, 'w')\n"
        "from transformers import LlamaConfig as Config, LlamaForCausalLM as Model\n"
        "from transformers import PreTrainedTokenizerFast as Tokenizer\n"
    )


@pytest.mark.parametrize("model_type", ["llama", "not-in-transformers"])
def test_code_of_a_model_is_not_run(spd, folder, text, marker, model_type, tmp_path):
    (folder / "evil.py").write_text(code_that_marks(marker))
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    change_json(folder / "config.json", model_type=model_type, auto_map=auto_map)
    outcome = profile(spd, folder, text, tmp_path)
    if model_type == "llama":  # transformers' own class of that name is taken
        assert outcome.code == 0, outcome.err
    else:
        assert outcome.code == 2 and "code of its own, which spd-calib never runs" in outcome.err
    assert not marker.exists()
    exec(code_that_marks(marker))  # the code would have left a mark
    assert marker.exists()


def test_code_of_a_tokenizer_is_not_run(spd, folder, text, marker, tmp_path):
    (folder / "evil.py").write_text(code_that_marks(marker))
    auto_map = {"AutoTokenizer": [None, "evil.Tokenizer"]}
    change_json(folder / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="Tokenizer")
    outcome = profile(spd, folder, text, tmp_path)
    assert outcome.code == 2 and "tokenizer" in outcome.err and "never runs" in outcome.err
    assert not marker.exists()


def test_every_load_by_transformers_says_that_code_is_not_trusted():
    """Left out, transformers asks on the terminal: every call that could run a folder's code must say no."""
    calls = 0
    for path in (ROOT / "spd_calib").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in (
                "from_pretrained", "from_config",
            ):  # fmt: skip
                owner = ast.unparse(node.func.value)
                if owner.startswith("Auto"):
                    said = {k.arg: ast.unparse(k.value) for k in node.keywords}
                    assert said.get("trust_remote_code") == "False", f"{path}:{node.lineno}"
                    calls += 1
    assert calls >= 5


def test_a_kernel_from_the_hub_is_refused(spd, folder, text, tmp_path):
    for key in ("attn_implementation", "_attn_implementation"):
        change_json(folder / "config.json", **{key: "someone/kernel"})
        outcome = profile(spd, folder, text, tmp_path)
        assert outcome.code == 2 and "someone/kernel, which is code and never run" in outcome.err, outcome.err
        change_json(folder / "config.json", **{key: None})


def test_weights_in_a_pickle_are_refused_with_the_reason_and_not_read(spd, folder, text, marker, tmp_path):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Marker(marker)))
    outcome = profile(spd, folder, text, tmp_path)
    assert outcome.code == 2 and "as a pickle (pytorch_model.bin), which may run code when read" in outcome.err
    assert not marker.exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes()).close()
    assert marker.exists()


def test_a_pickle_under_the_name_of_safetensors_is_not_read(spd, folder, text, marker, tmp_path):
    (folder / "model.safetensors").write_bytes(pickle.dumps(Marker(marker)))
    outcome = profile(spd, folder, text, tmp_path)
    assert outcome.code == 2 and "not a whole safetensors file" in outcome.err and not marker.exists()


def test_an_adapter_in_the_folder_is_refused(spd, folder, text, marker, tmp_path):
    """transformers would load it where peft is installed, or even the base model it names."""
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x/y"}))
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Marker(marker)))
    outcome = profile(spd, folder, text, tmp_path)
    assert outcome.code == 2 and "adapter_config.json" in outcome.err and not marker.exists()


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "other.safetensors"])
def test_weights_under_another_name_are_refused(spd, folder, text, name, tmp_path):
    shutil.copy(folder / "model.safetensors", folder / name)
    change_json(folder / "config.json", transformers_weights=name)
    outcome = profile(spd, folder, text, tmp_path)
    assert outcome.code == 2 and "transformers_weights" in outcome.err


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd", "sub/w.safetensors"])
def test_an_index_cannot_name_weights_outside_its_folder(spd, folder, text, name, tmp_path):
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    outcome = profile(spd, folder, text, tmp_path)
    assert outcome.code == 2 and f"lacks the weight file {name}" in outcome.err


@pytest.fixture(scope="module")
def compensated(llama, tmp_path_factory) -> Path:
    """The folder of a plan with predictors beside it."""
    folder = tmp_path_factory.mktemp("compensated") / "r"
    folder.mkdir()
    drop, keep = "block_drop", "keep_sync"
    plans.write_plan(folder / "plan.json", llama, 2, [keep, drop, keep, keep], kinds=[None, "mean", None, None])
    return folder


NAMES = ["../c.safetensors", "/etc/passwd", "a/../../c.safetensors", "c.bin", ".c.safetensors", "c.safetensors\n", ""]


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_cannot_name_predictors_elsewhere(spd, compensated, name, tmp_path):
    plan = json.loads((compensated / "plan.json").read_text())
    plan["compensation"]["file"] = name
    shutil.copy(compensated / "compensation.safetensors", tmp_path / "c.safetensors")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/plan.json").write_text(json.dumps(plan))
    outcome = spd("check", tmp_path / "sub/plan.json")
    assert outcome.code == 2 and "compensation.file" in outcome.err, outcome.err


def test_a_link_does_not_lead_out_of_the_folder_of_a_plan(spd, compensated, tmp_path):
    """But where plan and predictors are both links to one folder, as in the hub's cache, they are used."""
    name = "compensation.safetensors"
    for place in ("copied", "cache"):
        shutil.copytree(compensated, tmp_path / place)
    (tmp_path / "copied" / name).unlink()
    (tmp_path / "copied" / name).symlink_to(compensated / name)
    outcome = spd("check", tmp_path / "copied/plan.json")
    assert outcome.code == 2 and "leaves the folder" in outcome.err, outcome.err

    (tmp_path / "blobs").mkdir()
    for file in ("plan.json", name):
        (tmp_path / "cache" / file).rename(tmp_path / "blobs" / file)
        (tmp_path / "cache" / file).symlink_to(Path("../blobs") / file)
    assert spd("check", tmp_path / "cache/plan.json").code == 0


def test_predictors_in_a_pickle_are_not_read(spd, compensated, marker, tmp_path):
    """Even where the plan vouches for the file."""
    import hashlib

    folder = Path(shutil.copytree(compensated, tmp_path / "r"))
    content = pickle.dumps(Marker(marker))
    (folder / "compensation.safetensors").write_bytes(content)
    plan = json.loads((folder / "plan.json").read_text())
    plan["compensation"]["sha256"] = hashlib.sha256(content).hexdigest()
    (folder / "plan.json").write_text(json.dumps(plan))
    outcome = spd("check", folder / "plan.json")
    assert outcome.code == 2 and "not a whole safetensors file" in outcome.err and not marker.exists()


def test_a_plan_is_no_command(spd, compensated, marker, tmp_path):
    """The command line that stands in a plan is shown, never run."""
    folder = Path(shutil.copytree(compensated, tmp_path / "r"))
    plan = json.loads((folder / "plan.json").read_text())
    plan["provenance"]["command"] = f"touch {marker}; $(touch {marker})"
    (folder / "plan.json").write_text(json.dumps(plan))
    assert spd("check", folder / "plan.json").code == 0 and not marker.exists()


@pytest.mark.parametrize("field", ["model", "recovered_from"])
def test_a_plan_of_other_weights_is_refused(spd, compensated, llama, field, tmp_path):
    """What a plan names as its model, or as the model it was recovered from, must be of the weights it says."""
    folder = Path(shutil.copytree(compensated, tmp_path / "r"))
    plan = json.loads((folder / "plan.json").read_text())
    plan["recovered_from"] = dict(plan["model"])
    plan[field]["id"] = str(tiny.save(tiny.build("llama", seed=1), tmp_path / "other"))
    (folder / "plan.json").write_text(json.dumps(plan))
    outcome = spd("eval", folder / "plan.json", "--tasks", "demo", "--limit", 1, "-o", tmp_path / "r.json")
    assert outcome.code == 2 and "the weights differ" in outcome.err, outcome.err
    assert not (tmp_path / "r.json").exists()


ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(40)
)
RECIPES = {
    "tag": ("plan: !!python/object/apply:os.system ['touch {marker}']", "not valid YAML"),
    "tag_of_a_value": ("plan: {{drop: !!python/object/apply:os.system ['touch {marker}']}}", "not valid YAML"),
    "bomb_as_value": (ALIASES.replace("a0:", "plan:\n  drop: *a40\na0:", 1), "not valid YAML"),  # before it is defined
    "bomb": ("x:\n" + "".join(f"  {line}\n" for line in ALIASES.splitlines()) + "plan: {{drop: *a40}}", "drop must be"),
    "merge_bomb": ("x: &x {{y: 1}}\nplan: {{<<: [*x, *x]}}", "takes no 'y'"),
    "deep": ("[" * 20000, "not valid YAML"),
    "output": ("plan: {{output: /etc/cron.d/spd}}", "output /etc/cron.d/spd lies neither"),
    "up": ("plan: {{output: a/../../../plan.json}}", "lies neither"),
    "link": ("plan: {{output: link/plan.json}}", "lies neither"),
    "home": ("plan: {{pareto: ~/front.json}}", "lies neither"),
    "code": ("eval: {{include_path: tasks}}", "may hold code"),
    "code_as_task": ("eval: {{tasks: ./evil.yaml}}", "may hold code"),
    "code_among_tasks": ("eval: {{tasks: 'arc_easy,evil.yml'}}", "may hold code"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_neither_runs_nor_writes_elsewhere(spd, marker, name, tmp_path, monkeypatch):
    content, words = RECIPES[name]
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "link").symlink_to("/tmp")
    (inner / "r.yaml").write_text(content.format(marker=marker))
    monkeypatch.chdir(inner)
    outcome = spd("eval" if "eval" in content else "plan", "--recipe", inner / "r.yaml")
    assert outcome.code == 2 and words in outcome.err, outcome.err
    assert len(outcome.err) < 2000 and not marker.exists()


SPARSE = [
    (["plan", "{huge}.json", "--drop", "1"], "larger than"),
    (["check", "{huge}.json"], "larger than"),
    (["bench", "{huge}.json"], "larger than"),
    (["plan", "--recipe", "{huge}.json"], "larger than"),
    (["profile", "{config}", "--tp", "2", "--data", "{text}"], "config.json is larger than"),
    (["profile", "{index}", "--tp", "2", "--data", "{text}"], "index.json is larger than"),
    (["profile", "{tokenizer}", "--tp", "2", "--data", "{text}"], "tokenizer.json is larger than"),
    (["profile", "{header}", "--tp", "2", "--data", "{text}"], "not a whole safetensors file"),
    (["profile", "{deep_header}", "--tp", "2", "--data", "{text}"], "not a whole safetensors file"),
    (["profile", "{blocks}", "--tp", "2", "--data", "{text}"], "num_hidden_layers 1000000000"),
    (["profile", "{no_blocks}", "--tp", "2", "--data", "{text}"], "num_hidden_layers 0"),
    (["profile", "{width}", "--tp", "2", "--data", "{text}"], "width"),
    (["profile", "{vocabulary}", "--tp", "2", "--data", "{text}"], "vocabulary"),
    (["profile", "{neurons}", "--tp", "2", "--data", "{text}"], "neurons"),
    (["profile", "{positions}", "--tp", "2", "--data", "{text}"], "positions"),
]


def sparse(path: Path, size: int, beginning: bytes = b"") -> None:
    with open(path, "wb") as f:
        f.write(beginning)
        f.truncate(size)


@pytest.fixture(scope="module")
def giants(llama, text, tmp_path_factory) -> dict[str, Path]:
    """Files that take no room on disk and would take gigabytes in memory, and folders that claim to need them."""
    tmp = tmp_path_factory.mktemp("giants")
    sparse(tmp / "huge.json", 8 * 2**30, b'{"format": "spd-calib/plan", "x": "')
    opt = tiny.save(tiny.build("opt"), tmp / "opt")
    out = {"huge": tmp / "huge", "text": text}
    for name, values in {
        "config": {}, "index": {}, "tokenizer": {}, "header": {}, "deep_header": {},
        "blocks": {"num_hidden_layers": 10**9}, "no_blocks": {"num_hidden_layers": 0},
        "width": {"hidden_size": 2**20}, "vocabulary": {"vocab_size": 10**9}, "neurons": {"intermediate_size": 10**9},
        "positions": {"max_position_embeddings": 10**9},
    }.items():  # fmt: skip
        out[name] = Path(shutil.copytree(opt if name == "positions" else llama, tmp / name))
        change_json(out[name] / "config.json", **values)
    sparse(out["config"] / "config.json", 8 * 2**30, b'{"model_type": "llama", "x": "')
    sparse(out["tokenizer"] / "tokenizer.json", 8 * 2**30, b'{"x": "')
    (out["index"] / "model.safetensors").unlink()
    sparse(out["index"] / "model.safetensors.index.json", 8 * 2**30, b'{"weight_map": {"')
    sparse(out["header"] / "model.safetensors", 8 * 2**30, (8 * 2**30 - 8).to_bytes(8, "little"))
    deep = b"[" * 200_000
    (out["deep_header"] / "model.safetensors").write_bytes(len(deep).to_bytes(8, "little") + deep)
    return out


def test_sizes_are_checked_before_memory_is_taken(giants, tmp_path):
    """One process runs them all, allowed little more memory than it has when everything is imported."""
    script = tmp_path / "run.py"
    script.write_text(
        "import contextlib, io, json, resource, sys\n"
        "import torch, transformers, lm_eval\n"
        "from spd_calib.cli.main import main\n"
        "from spd_calib.parallel.session import open_session\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        f"resource.setrlimit(resource.RLIMIT_AS, (used + {MEMORY}, used + {MEMORY}))\n"
        "for arguments in json.load(open(sys.argv[1])):\n"
        "    sys.argv, said, code = ['spd-calib', *arguments], io.StringIO(), 0\n"
        "    with contextlib.redirect_stderr(said):\n"
        "        try: main()\n"
        "        except SystemExit as e: code = e.code\n"
        "    print(json.dumps([code, said.getvalue()]))\n"
    )
    arguments = [
        [a.format(**giants) for a in args] + ["--seq-len", "16"] * (args[0] == "profile") for args, _ in SPARSE
    ]
    (tmp_path / "arguments.json").write_text(json.dumps(arguments))
    done = subprocess.run(
        [sys.executable, script, tmp_path / "arguments.json"], capture_output=True, text=True, timeout=200, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(outcomes) == len(SPARSE)
    for (args, words), (code, said) in zip(SPARSE, outcomes, strict=True):
        assert code == 2 and words in said and "emory" not in said, (args, said)


def test_every_test_named_in_security_md_exists():
    """And every test here is named there: a promise without a test is none, nor a test without a promise."""
    named = set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", (ROOT / "docs/security.md").read_text()))
    assert len(named) > 15
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(), f"{file} holds no {test}"
    here = set(re.findall(r"^def (test_\w+)", Path(__file__).read_text(), re.M))
    assert here <= {test for _, test in named} | {test_every_test_named_in_security_md_exists.__name__}
