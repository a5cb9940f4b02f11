"""--json alone on stdout, tables that hold together at 60 columns, no colour where none is wanted.

Each command runs once, in a forked process whose stderr is a pseudo-terminal of 60 columns and whose stdout is a pipe.
"""

import hashlib
import json
import re

import pytest
from screens import WIDTH, Shown, command, on_terminal

from spd_calib.api.check import CheckResult
from spd_calib.cli import demo, terminal
from spd_calib.formats.files import dumps
from spd_calib.formats.plan import Plan
from spd_calib.formats.profile import Profile
from spd_calib.formats.results import Results
from spd_calib.reporting.table import nats

COLOUR = re.compile(r"\x1b\[(?:[0-9]*;)*(?:3[0-79]|4[0-79]|9[0-7]|38|48)[;m]")


@pytest.fixture(scope="module")
def ran(llama, text, tmp_path_factory) -> dict[str, Shown]:
    """Every command with --json, one after the other, as a user would; demo and report stand below."""
    place = tmp_path_factory.mktemp("terminal")
    model, made, plan = (place / name for name in ("model", "profile.json", "plan.json"))
    model.symlink_to(llama)
    sizes = ["--seq-len", 32, "--max-samples", 12, "--verify-samples", 8, "--device", "cpu"]
    cpu = ["--device", "cpu"]
    runs = {
        "profile": ["profile", model, "--tp", 2, "--data", text, "-o", made, *sizes, "--sync-points", "attention,mlp"],
        "dry-run": ["profile", model, "--tp", 2, "--data", text, "-o", made, *sizes, "--dry-run"],
        "fisher": ["profile", model, "--tp", 2, "--data", text, "-o", place / "f.json", *sizes, "--method", "fisher"],
        "plan": ["plan", made, "--drop", 3, "-o", plan, "--compare", "--pareto", place / "pareto.json", *cpu],
        "pareto": ["plan", made, "--pareto", place / "pareto2.json", *cpu],
        "check": ["check", plan, *cpu],
        "eval": ["eval", plan, "--tasks", "demo", "--limit", 2, "-o", place / "results.json", *cpu],
        "generate": ["generate", plan, "--prompt", "One day", "--new-tokens", 4, "--dense", *cpu],
        "recover": ["recover", plan, "--data", text, "-o", place / "recovered", *sizes, "--methods", "compensation"],
        "bench": ["bench", plan, "-o", place / "h.json", "--rounds", 1, "--new-tokens", 2, "--tokens", 8, *cpu],
    }
    return {name: on_terminal(command(*words, "--json")) for name, words in runs.items()}


FILES = {"profile": "profile", "fisher": "profile", "plan": "plan", "pareto": "pareto", "eval": "results"}
FILES |= {"recover": "plan", "bench": "hardware"}


@pytest.mark.parametrize("name", ["profile", "fisher", "plan", "pareto", "eval", "recover", "bench"])
def test_json_is_the_file_and_nothing_else(name, ran):
    assert ran[name].code == 0, ran[name].raw
    assert json.loads(ran[name].out)["format"] == f"spd-calib/{FILES[name]}"


def test_json_of_commands_that_write_no_file(ran):
    rows = json.loads(ran["check"].out)
    assert [row["ok"] for row in rows] == [True] * len(rows) and rows[0]["what"] == "the file"
    found = json.loads(ran["generate"].out)
    assert [(row["model"], row["prompt"]) for row in found] == [("dense", "One day"), ("plan", "One day")]
    assert all(isinstance(row["text"], str) and row["text"] for row in found)
    assert json.loads(ran["dry-run"].out)["batches"] == 2


def test_every_line_fits_the_terminal(ran):
    for name, shown in ran.items():
        assert shown.code == 0, (name, shown.raw)
        assert max(map(len, shown.lines)) <= WIDTH, name


def whole(shown: Shown, *values: str) -> None:
    for value in values:
        assert value in shown.tables, (value, shown.tables)


def test_numbers_of_narrow_tables_are_whole(ran):
    """Every figure that stands in the file stands in one piece on the screen."""
    measured = json.loads(ran["profile"].out)
    whole(ran["profile"], *(f"{m['kl']:.4f} ± {m['kl_stderr']:.4f}" for m in measured["measurements"]))
    planned = json.loads(ran["plan"].out)
    verified = planned["verified"]
    whole(ran["plan"], *(f"{b['kl']:.4f}" for b in planned["blocks"]), f"{100 * verified['ppl_increase']:+.2f} %")
    whole(ran["plan"], f"{verified['kl']:.4f} ± {verified['kl_stderr']:.4f}", "block_drop")
    whole(ran["pareto"], *(f"{p['predicted_kl']:.4f}" for p in json.loads(ran["pareto"].out)["points"]))
    for task in json.loads(ran["eval"].out)["tasks"]:
        whole(ran["eval"], task["task"], f"{task['planned']:.4f}", f"{task['difference']:+.4f}")
    hardware = json.loads(ran["bench"].out)
    whole(ran["bench"], *(f"{s['seconds']['median'] * 1e3:.1f} (" for s in hardware["steps"]))
    whole(ran["check"], "all-reduces", "8 dense")


def test_progress_says_how_much_is_left_where_it_is_a_terminal(ran):
    for name in ("profile", "fisher", "plan", "eval", "recover", "generate"):
        bars = [line for line in ran[name].lines if "━" in line]
        assert bars and any(re.search(r" \d+/\d+ 0:00:\d\d ", line) for line in bars), (name, bars)


def test_demo_prints_its_three_files(ran, tmp_path, monkeypatch):
    """The steps are stood in for by what the other commands wrote: what is shown is demo's own doing."""
    import spd_calib

    profiled, planned = Profile.model_validate_json(ran["profile"].out), Plan.model_validate_json(ran["plan"].out)
    results = Results.model_validate_json(ran["eval"].out).model_copy(update={"plan_sha256": sha(planned)})
    for name, value in {"profile": profiled, "plan": planned, "evaluate": results}.items():
        monkeypatch.setattr(spd_calib, name, lambda *a, value=value, **k: value, raising=False)
    monkeypatch.setattr(spd_calib, "check", lambda *a, **k: CheckResult([]), raising=False)
    shown = on_terminal(lambda: demo.demo(output=tmp_path / "demo", json=True))
    assert shown.code == 0, shown.raw
    found = json.loads(shown.out)
    assert {name: part["format"] for name, part in found.items()} == {
        "profile": "spd-calib/profile", "plan": "spd-calib/plan", "results": "spd-calib/results"
    }  # fmt: skip
    names = ("profile.json", "plan.json", "results.json", "report.html", "sensitivity.png")
    assert {path.name for path in (tmp_path / "demo").iterdir()} == set(names)


def sha(document) -> str:
    return hashlib.sha256(dumps(document).encode()).hexdigest()


TABLE = [["0", "keep_sync", "2.8462", "block_drop costs KL 2.85, beyond the budget"], ["1", "block_drop", "0.0001", ""]]


def show_table() -> None:
    terminal.table("a plan", ["block", "strategy", "KL alone", "why"], TABLE, left=2)


def test_colours_are_for_terminals_that_want_them():
    assert COLOUR.search(on_terminal(show_table).raw)
    assert not COLOUR.search(on_terminal(show_table, NO_COLOR="1").raw)
    assert "\x1b" not in on_terminal(show_table, TERM="dumb").raw


def test_where_stderr_is_no_terminal_it_is_plain(capfd, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    show_table()
    with terminal.working("work", 2) as work:
        work.step()
    out, err = capfd.readouterr()
    assert out == "" and "\x1b" not in err and "━" not in err and "2.8462" in err


def test_a_log_is_told_now_and_then(capfd, monkeypatch):
    """Every 30 s or 5 % of the steps, whichever is later: 100 steps of 4 s each, then 1000 of 0.1 s."""
    clock = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(terminal.console, "width", 200)
    for steps, seconds, said in ((100, 4.0, [8, 16]), (1000, 0.1, [300, 600]), (20, 200.0, [1, 2])):
        with terminal.working("work", steps) as work:
            for _ in range(steps):
                clock[0] += seconds
                work.step("a note")
        lines = capfd.readouterr().err.splitlines()
        assert [int(line.split()[1]) for line in lines][:2] == said, lines
        assert all(
            line.startswith("work: ") and f" of {steps} in " in line and "left (a note)" in line for line in lines
        )
    assert lines[0] == "work: 1 of 20 in 3 min, about 1 h 03 min left (a note)"


def test_a_log_of_unknown_length_is_told_as_well(capfd, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: clock[0])
    with terminal.working("work") as work:
        for _ in range(3):
            clock[0] += 20
            work.step()
    assert capfd.readouterr().err == "work: 2 in 40 s\n"


@pytest.mark.parametrize("width", [24, 30, 40, 60, 80, 160])
def test_tables_use_the_room_there_is(width):
    shown = on_terminal(show_table, width)
    assert max(map(len, shown.lines)) <= width
    for word in ("keep_sync", "2.8462", "budget", "block_drop") if width >= 40 else ():
        assert word in shown.tables
    assert ("block_drop costs KL 2.85, beyond the budget" in shown.tables) == (width >= 80)


def test_words_of_files_are_no_markup():
    rows = [["[red]x[/red]", "[/bold]", "1"]]
    assert "[red]x[/red]" in on_terminal(lambda: terminal.table("[bold]t", ["a", "b", "c"], rows, left=2), 80).tables


def test_work_counts_what_it_is_told():
    def run() -> None:
        with terminal.working("measure") as work:
            work.expect(2)
            work.step("first")
            work.expect(3)
            for _ in range(4):
                work.step()
            assert (work.done, work.total) == (5, 5)

    shown = on_terminal(run, 80)
    assert shown.code == 0 and any("5/5" in line for line in shown.lines)


@pytest.mark.parametrize(
    ("kl", "stderr", "shown"),
    [(0.0123456, 0.00049, "0.0123 ± 0.0005"), (0.001, 0.0002, "0.0010 ± 0.0002"),
     (0.00062, 0.00001, "0.00062 ± 0.00001"),
     (0.0000128, 0.0000019, "0.000013 ± 0.000002"), (-0.00002, None, "-0.000020"), (0.0, 0.0, "0.0000 ± 0.0000"),
     (3.25, 0.1, "3.2500 ± 0.1000"), (1e-12, None, "0.0000")],
)  # fmt: skip
def test_small_kls_show_two_digits(kl, stderr, shown):
    assert nats(kl, stderr) == shown
