"""Every command line in README, CONTRIBUTING, docs/, recipes and --help is run, or RUN says what becomes of it.

They are run on the shipped model with a handful of sequences and on two ranks. A line by a program that is not in RUN
fails.
"""

import ast
import json
import os
import py_compile
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from spd_calib.cli.main import app
from spd_calib.demo.assets import data_file, model_dir, tasks_dir

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
GROUP = typer.main.get_command(app)

SUBSTITUTIONS = (
    (r"\b(meta-llama/\S+|MODEL)\b", "demo"),
    (r"--data other\.jsonl", f"--data {data_file('heldout')}"),
    (r"--data (wikitext|DATA|demo|(?!/)\S+\.jsonl)", f"--data {data_file('calibration')}"),
    (r"--tp \d+", "--tp 2"),
    (r"--nproc-per-node \d+", "--nproc-per-node 2"),
    (r"--tasks arc_easy,hellaswag|--tasks arc_easy(?! --limit)|\.\.\.$", "--tasks demo"),
)
"""What cannot be here -> what is run in its place: gated or large models and text, eight ranks, tasks from the hub."""

SMALLER = {
    "profile": "--seq-len 48 --max-samples 8 --verify-samples 8",
    "eval": "--limit 2",
    "recover": "--methods grouping --max-samples 40 --verify-samples 8",
    "bench": "--rounds 1 --tokens 8 --new-tokens 2 --device cpu",
    "check": "--new-tokens 2 --device cpu",
    "generate": "--new-tokens 4",
}
"""Command -> what is appended, so that it takes a moment; the last of two options counts."""


def context(path: str = "") -> typer.Context:
    outer = GROUP.make_context("spd-calib", ["profile"], resilient_parsing=True)
    command = GROUP.get_command(outer, path)
    assert command is not None, f"spd-calib has no command {path!r}"
    return command.make_context(path, [], parent=outer, resilient_parsing=True)


def commands_of(page: Path) -> Iterator[str]:
    """The shell lines of a page: in console, sh and bash blocks, in indented blocks, and in backquotes."""
    fence = None
    for line in re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8")).splitlines():
        if line.lstrip().startswith("```"):
            fence = None if fence is not None else line.lstrip()[3:].strip()
        elif fence in ("console", "sh", "bash", "shell"):
            yield line.removeprefix("$ ").strip()
        elif fence is None and line.startswith("    "):
            if is_program(line.split()[0] if line.split() else ""):
                yield line.strip()
        elif fence is None:
            for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", line):
                if " " in span and is_program(span.split()[0]):
                    yield span


def is_program(word: str) -> bool:
    return word in RUN or (re.fullmatch(r"[\w./-]+", word) is not None and shutil.which(word) is not None)


def help_examples() -> Iterator[str]:
    for name in GROUP.list_commands(context("demo").parent):
        epilog = context(name).command.epilog or ""
        assert "Example: " in epilog, f"spd-calib {name} --help shows no example"
        yield epilog.split("Example: ", 1)[1].strip()


def recipe_commands() -> Iterator[str]:
    for recipe in sorted((ROOT / "recipes").rglob("*.yaml")):
        yield from re.findall(r"^#   (\S.*)$", recipe.read_text(encoding="utf-8"), re.M)


def here(line: str) -> str:
    for pattern, replacement in SUBSTITUTIONS:
        line = re.sub(pattern, replacement.replace("\\", "/"), line)
    return line


def spd_calib(words: list[str], spd) -> None:
    command = words[1]
    assert context(command)
    if (len(words) == 2 and command != "demo") or words[2:] == ["--help"]:
        return  # named in a sentence, not shown to be typed
    if command == "demo" or "--runtime vllm" in " ".join(words):
        # the whole demo is make release-check's; vLLM is tests/with_vllm's
        GROUP.get_command(context(command).parent, command).make_context(command, words[2:])
        return
    if command == "lm-eval":
        words = [*words, "--include_path", str(tasks_dir()), "--limit", "2"]
        words[words.index("--tasks") + 1] = "spd_demo_who"
    if command == "report":  # the lines before left a plan of another profile
        assert spd("plan", "profile.json", "--drop", "2", "-o", "plan.json", "--device", "cpu").code == 0
    if command == "recover":
        for folder in ("recovered", "recovered.partial"):
            shutil.rmtree(folder, ignore_errors=True)
    done = spd(*words[1:], *SMALLER.get(command, "").split())
    assert done.code == 0, done.err


def torchrun(words: list[str], spd) -> None:
    command = words[words.index("spd_calib") + 1]
    shutil.rmtree("recovered", ignore_errors=True)
    words = [sys.executable, "-m", "torch.distributed.run", *words[1:], *SMALLER.get(command, "").split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run([*words, "--device", "cpu"], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def make(words: list[str], spd) -> None:
    done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def vllm(words: list[str], spd) -> None:
    """Only what is ours of it: the key that the plugin reads. tests/with_vllm starts real engines."""
    from spd_calib.runtimes.vllm import configure

    if len(words) == 2:
        return  # named in a sentence, not shown to be typed
    given = json.loads(words[words.index("--additional-config") + 1])
    assert list(given) == ["spd_plan"] and '"spd_plan"' in Path(configure.__file__).read_text(encoding="utf-8")


def pip(words: list[str], spd) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert words[-1] in (project["name"], ".")


def script(words: list[str], spd) -> None:
    """A benchmark or a generator, by its path: what it takes is beyond a test."""
    path = next(word for word in words if word.endswith(".py"))
    py_compile.compile(str(ROOT / path), doraise=True)


RUN = {
    "spd-calib": spd_calib,
    "torchrun": torchrun,
    "make": make,
    "vllm": vllm,
    "pip": pip,
    "python": script,
    "sudo": script,
    ".venv/bin/python": script,
}


def lines() -> dict[str, str]:
    """What is run -> where it first stands."""
    found: dict[str, str] = {}
    places = [(page.name, commands_of(page)) for page in PAGES]
    for where, commands in [*places, ("--help", help_examples()), ("recipes", recipe_commands())]:
        for line in commands:
            found.setdefault(here(shlex.join(shlex.split(line, comments=True))), where)
    return found


LINES = lines()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the lines are run: a profile and a plan of the shipped model lie there, as they do for who reads on."""
    from spd_calib import RunOptions, TextSelection, plan, profile
    from spd_calib.formats.files import dumps

    place, run = tmp_path_factory.mktemp("docs"), RunOptions(device="cpu")
    text = TextSelection(seq_len=48, max_samples=8, verify_samples=8)
    profiled = profile("demo", tp=2, data=str(data_file("calibration")), text=text, run=run)
    (place / "profile.json").write_text(dumps(profiled))
    (place / "plan.json").write_text(dumps(plan(profiled, drop=4, run=run)))
    for name in ("profile", "plan"):
        shutil.copy(place / f"{name}.json", place / f"other-{name}.json")
    return place


@pytest.mark.parametrize("line", [pytest.param(line, id=f"{where}: {line[:60]}") for line, where in LINES.items()])
def test_the_command_line_works(line, folder, spd, monkeypatch):
    words = shlex.split(line)
    assert words[0] in RUN, f"{words[0]} is new: say in RUN how it is to be tried"
    monkeypatch.chdir(folder)
    RUN[words[0]](words, spd)


IN_PYTHON = (
    (r'"meta-llama/[^"]+"', repr(str(model_dir()))),
    (r"torch\.bfloat16", "torch.float32"),
    (r'"wikitext"', '"demo"'),
    (r"\btp=8\b", "tp=2"),
    (r"seq_len=\d+, max_samples=\d+, verify_samples=\d+", "seq_len=48, max_samples=8, verify_samples=4"),
    (r'\["arc_easy", "hellaswag"\], limit=\d+', '["demo"], limit=2'),
)
"""As SUBSTITUTIONS, in blocks of Python."""


def cells_of(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize("page", [p for p in PAGES if cells_of(p)], ids=lambda p: p.name)
def test_the_cells_of_a_page_run_one_after_the_other(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for cell in cells_of(page):
        for pattern, replacement in IN_PYTHON:
            cell = re.sub(pattern, replacement.replace("\\", "/"), cell)
        exec(compile(cell, str(page), "exec"), names)
    if page.name == "from_python.md":
        printed = capsys.readouterr().out
        assert "block 0: KL" in printed and "are dropped, verified at KL" in printed and "would be run: " in printed
        assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.json", "report.html"]


def test_no_line_escapes(tmp_path):
    """The collector on a page with every way to show a command, one of them by a program that RUN does not know."""
    page = tmp_path / "page.md"
    page.write_text(
        "Say `spd-calib check p.json` or `x + y`.\n\n    make demo  # all\n    x = y + 1\n    ls -l\n\n"
        "```console\n$ spd-calib plan p.json \\\n  --drop 2\n$ frobnicate now\n```\n\n```text\n$ make test\n```\n"
    )
    assert list(commands_of(page)) == [
        "spd-calib check p.json", "make demo  # all", "ls -l", "spd-calib plan p.json --drop 2", "frobnicate now"
    ]  # fmt: skip
    assert "ls" not in RUN and "frobnicate" not in RUN


def test_lines_are_found_where_they_stand():
    """The collector itself: README's and the tutorial's lines are among what is run."""
    for wanted in ("spd-calib eval plan.json --tasks demo -o results.json", "make demo", "make test"):
        assert wanted in LINES
    assert sum(where == "tutorial.md" for where in LINES.values()) >= 5


def test_the_site_builds_without_a_warning(tmp_path):
    """Every page in the table of contents, every link between pages and to headings whole; no network."""
    pytest.importorskip("sphinx")
    words = ["-W", "--keep-going", "-q", "-b", "html", "-d", str(tmp_path / "trees"), str(ROOT / "docs")]
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *words, str(tmp_path / "html")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "html/tutorial.html").exists()


def test_the_generated_pages_are_those_of_the_code():
    done = subprocess.run([sys.executable, ROOT / "docs/generate.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def walks() -> dict[str, list[tuple[str, str]]]:
    """The numbered walks of the design page, by the sentence before them: files, and a function in each."""
    text = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    found = re.findall(r"^([^\n]+)\n\n((?:\d+\. `[^\n]+\n)+)", text, re.M)
    return {title: re.findall(r"^\d+\. `([^`]+)`, `([^`]+)`", steps, re.M) for title, steps in found}


def test_the_walks_of_the_design_page_are_those_of_the_code():
    """Each is at most ten steps, none of them taken twice, and each a function that is there."""
    assert len(walks()) == 3
    for title, steps in walks().items():
        assert 8 <= len(steps) <= 10 and len(set(steps)) == len(steps), title
        for file, name in steps:
            *outer, function = name.split(".")
            body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
            for cls in outer:
                body = next(n.body for n in body if isinstance(n, ast.ClassDef) and n.name == cls)
            assert any(isinstance(n, ast.FunctionDef) and n.name == function for n in body), f"{file}: {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page):
    """Those of README and CONTRIBUTING, too, which are not part of the site."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target
