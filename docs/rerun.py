"""Runs the commands that a page shows and puts what they print behind them: `python docs/rerun.py docs/tutorial.md`.

A block fenced as `console` holds one command a line, each after `$ `; the `text` block behind it is written anew.
All commands of a page run in one empty folder, 100 columns wide.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

# how far a long command is: never twice the same
NOW_AND_THEN = re.compile(r"[\w -]+: \d+( of \d+)? in \d+ (s|min|h)\b")
BLOCK = re.compile(r"```console\n(.*?)```\n(?:\n```text\n.*?```\n)?", re.S)


def rerun(page: Path) -> None:
    environment = {
        **os.environ,
        "COLUMNS": "100",
        "NO_COLOR": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    with tempfile.TemporaryDirectory() as folder:

        def run(block: re.Match) -> str:
            printed = []
            for line in block[1].splitlines():
                command = line.removeprefix("$ ")
                print(command, file=sys.stderr)
                done = subprocess.run(
                    command, shell=True, cwd=folder, env=environment, text=True,
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                )  # fmt: skip
                if done.returncode:
                    raise SystemExit(f"{command}: exit code {done.returncode}\n{done.stdout}")
                printed += [text.rstrip() for text in done.stdout.splitlines() if not NOW_AND_THEN.match(text)]
            said = "\n".join(printed).strip("\n")
            return f"```console\n{block[1]}```\n" + (f"\n```text\n{said}\n```\n" if said else "")

        text = BLOCK.sub(run, page.read_text(encoding="utf-8"))
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        rerun(Path(name))
