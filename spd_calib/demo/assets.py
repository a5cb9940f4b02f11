"""The places of what ships with the package: a small Llama, its text, and its three lm-eval tasks."""

from pathlib import Path

HERE = Path(__file__).parent
TASKS = ("spd_demo_where", "spd_demo_who", "spd_demo_count")


def model_dir() -> Path:
    """Return the folder of the shipped checkpoint, as `from_pretrained` takes it."""
    return HERE / "model"


def data_file(name: str) -> Path:
    """Return the file of the stories called "calibration" or "heldout", one {"text": ...} a line."""
    return HERE / "data" / f"{name}.jsonl"


def tasks_dir() -> Path:
    """Return the folder of the shipped tasks, for lm-eval's `--include_path`."""
    return HERE / "tasks"
