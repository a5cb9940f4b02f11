"""--help fits a screen and leaves nothing out; the shell's completion knows the commands."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from spd_calib.cli.main import app

OWN_HELP = "lm-eval"  # prints lm-eval's own
COMMANDS = [c for c in app.registered_commands if c.name != OWN_HELP]
LINES, WIDTH = 36, 80


def help_of(spd, monkeypatch, width: int, *command: str) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(width))
    outcome = spd(*command, "--help")
    assert outcome.code == 0 and not outcome.err
    return outcome.out.rstrip().splitlines()


@pytest.mark.parametrize("name", ["", *(c.name for c in COMMANDS)])
def test_help_fits_a_screen_and_shows_an_example(name, spd, monkeypatch):
    lines = help_of(spd, monkeypatch, WIDTH, *filter(None, [name]))
    assert len(lines) <= LINES and max(map(len, lines)) < WIDTH
    assert any("spd-calib " in line for line in lines[-3:])


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.name)
@pytest.mark.parametrize("width", [60, 80, 160])
def test_help_names_every_option_at_any_width(command, width, spd, monkeypatch):
    lines = help_of(spd, monkeypatch, width, command.name)
    assert max(map(len, lines)) < width
    words = " ".join(lines).replace(";", " ").split()
    for name in inspect.signature(command.callback).parameters:
        option = "--" + name.replace("_", "-")
        assert option in words or name in words, option


def test_options_stand_in_their_groups(spd, monkeypatch):
    lines = help_of(spd, monkeypatch, WIDTH, "plan")
    heads = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert heads[0].startswith("Options") and heads[1] == "Budget, exactly one:" and heads[-1].startswith("As in other")
    budget = lines[lines.index(heads[1]) + 1 : lines.index(heads[2])]
    assert {line.split()[0] for line in budget} >= {"--max-kl", "--max-ppl-increase", "--drop", "--tau1"}
    assert lines.count("  -o, --output PATH      The plan. [plan.json]") == 1


def complete(*words: str) -> list[str]:
    """What bash would offer for the last of the words."""
    variables = {"_SPD_CALIB_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(words)}
    command = [sys.executable, "-c", "from spd_calib.cli.main import app; app(prog_name='spd-calib')"]
    found = subprocess.run(
        command,
        env=os.environ | variables | {"COMP_CWORD": str(len(words) - 1)},
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.split()


def test_bash_completes_commands_and_options():
    assert complete("spd-calib", "pr") == ["profile"]
    assert complete("spd-calib", "plan", "--max-k") == ["--max-kl"]


def test_the_completion_script_is_bash():
    script = Path(sys.executable).parent / "spd-calib"
    asked = os.environ | {"_SPD_CALIB_COMPLETE": "source_bash"}  # --show-completion needs a shell as caller
    found = subprocess.run([script], env=asked, capture_output=True, text=True, check=True).stdout
    assert subprocess.run(["bash", "-n"], input=found, text=True, check=False).returncode == 0
    assert "complete" in found and "spd-calib" in found


def test_a_hidden_option_is_not_shown():
    """Of a command of the test's own: the formatter itself."""
    from typer.testing import CliRunner

    from spd_calib.cli.help import Command

    other = typer.Typer(rich_markup_mode=None, add_completion=False)

    @other.command(cls=Command)
    def run(
        count: int = 3,
        secret: str = typer.Option("x", hidden=True),
        name: str = typer.Option(..., help="Who.", rich_help_panel="People"),
    ) -> None:
        """Do it."""

    lines = CliRunner().invoke(other, ["--help"], env={"COLUMNS": "80"}).output.splitlines()
    assert "  --count N    [3]" in lines and "  --name NAME  Who. [required]" in lines and "People:" in lines
    assert not any("secret" in line for line in lines)
