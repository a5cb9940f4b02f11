"""--json alone on stdout, tables that hold together at 60 columns, no colour where none is wanted.

Each command runs once, in a forked process whose stderr is a pseudo-terminal of 60 columns and whose stdout is a pipe.
"""

import fcntl
import json
import os
import pty
import re
import struct
import sys
import termios
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from spd_calib.cli import check as check_command
from spd_calib.cli import demo, main, terminal
from spd_calib.cli import eval as eval_command
from spd_calib.cli import plan as plan_command
from spd_calib.cli import profile as profile_command
from spd_calib.cli import report as report_command
from spd_calib.report.table import nats

WIDTH = 60
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
COLOUR = re.compile(r"\x1b\[(?:[0-9]*;)*(?:3[0-79]|4[0-79]|9[0-7]|38|48)[;m]")


@dataclass(frozen=True)
class Shown:
    code: int
    out: str
    raw: str  # what the terminal got

    @property
    def lines(self) -> list[str]:
        """As they would stand on the screen, those that a progress bar redraws among them."""
        return [line.rstrip() for line in re.split(r"\r\n|\r|\n", ESCAPE.sub("", self.raw))]

    @property
    def tables(self) -> str:
        return "\n".join(line for line in self.lines if "━" not in line)


def on_terminal(call: Callable[[], object], width: int = WIDTH, **environment: str) -> Shown:
    """Run `call` in a forked process on a terminal of `width` columns."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
                os.environ.pop(name, None)
            os.environ |= {"TERM": "xterm-256color", **environment}
            for source, target in ((slave, 0), (writing, 1), (slave, 2)):
                os.dup2(source, target)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            terminal.console.__init__(stderr=True, highlight=False)  # type: ignore[misc]
            code = call() or 0  # type: ignore[assignment]
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(slave)
    os.close(writing)
    raw, out = _drain(master), _drain(reading)
    return Shown(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), out, raw)


def _drain(descriptor: int) -> str:
    parts = []
    while True:
        try:
            part = os.read(descriptor, 65536)
        except OSError:  # the terminal's other end is closed
            break
        if not part:
            break
        parts.append(part)
    os.close(descriptor)
    return b"".join(parts).decode()


def command(*words: object) -> Callable[[], object]:
    def call() -> None:
        sys.argv = ["spd-calib", *map(str, words)]
        main.main()

    return call


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
        "plan": ["plan", made, "--drop", 3, "-o", plan, "--compare", "--pareto", place / "front.json", *cpu],
        "front": ["plan", made, "--pareto", place / "front2.json", *cpu],
        "check": ["check", plan, *cpu],
        "eval": ["eval", plan, "--tasks", "demo", "--limit", 2, "-o", place / "results.json", *cpu],
        "generate": ["generate", plan, "--prompt", "One day", "--new-tokens", 4, "--dense", *cpu],
        "recover": ["recover", plan, "--data", text, "-o", place / "recovered", *sizes, "--methods", "compensation"],
        "bench": ["bench", plan, "-o", place / "h.json", "--rounds", 1, "--new-tokens", 2, "--tokens", 8, *cpu],
    }
    return {name: on_terminal(command(*words, "--json")) for name, words in runs.items()}


FILES = {"profile": "profile", "fisher": "profile", "plan": "plan", "front": "front", "eval": "results"}
FILES |= {"recover": "plan", "bench": "hardware"}


@pytest.mark.parametrize("name", ["profile", "fisher", "plan", "front", "eval", "recover", "bench"])
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
    whole(ran["front"], *(f"{p['predicted_kl']:.4f}" for p in json.loads(ran["front"].out)["points"]))
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
    say = {
        "profile": lambda *a, output, **k: output.write_text(ran["profile"].out),
        "plan": lambda *a, output, **k: output.write_text(ran["plan"].out),
        "evaluate": lambda *a, output, **k: output.write_text(ran["eval"].out),
        "check": lambda *a, **k: None,
        "report": lambda *a, **k: None,
    }
    modules = {"profile": profile_command, "plan": plan_command, "evaluate": eval_command}
    modules |= {"check": check_command, "report": report_command}
    for name, module in modules.items():
        monkeypatch.setattr(module, name, say[name])
    shown = on_terminal(lambda: demo.demo(output=tmp_path / "demo", json=True))
    assert shown.code == 0, shown.raw
    found = json.loads(shown.out)
    assert {name: part["format"] for name, part in found.items()} == {
        "profile": "spd-calib/profile", "plan": "spd-calib/plan", "results": "spd-calib/results"
    }  # fmt: skip


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
