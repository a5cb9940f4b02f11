"""The log of documents: what the dense and the planned model said to each, side by side."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spd_calib.errors import InputError
from spd_calib.formats.files import check_writable, unwritable, write_bytes

from .harness import Outcome

OF_A_MODEL = ("resps", "filtered_resps")  # and every metric


def check_log_writable(path: Path) -> None:
    """Fail before the work, not after it. Raises InputError where the log could not be written to `path`."""
    if path.suffix == ".jsonl":
        check_writable({"log of documents": path})
    elif path.exists() and not path.is_dir():
        raise InputError(f"{path} is no folder for the log of documents; name a folder, or a file that ends in .jsonl.")
    else:
        trial = path.absolute().parent / f".{path.name}.jsonl" if not path.exists() else path / "x.jsonl"
        check_writable({"log of documents": trial})


def write_log(path: Path, *, dense: Outcome, planned: Outcome) -> list[Path]:
    """Write one JSON line a document and filter of lm-eval; return the files written.

    To `path` where it ends in .jsonl, else to a file a task in the folder `path`, samples_TASK.jsonl. A line holds the
    task and what lm-eval logs of a document (doc_id, doc, target, arguments, filter, and hashes), with the answers and
    metrics of each model under "dense" and "planned". Raises what write_bytes raises.
    """
    lines = {
        task: [_line(task, dense=d, planned=p) for d, p in zip(samples, planned.samples[task], strict=True)]
        for task, samples in dense.samples.items()
    }
    if path.suffix == ".jsonl":
        write_bytes(path, b"".join(line for of_task in lines.values() for line in of_task))
        return [path]
    try:
        path.mkdir(exist_ok=True)
    except OSError as e:
        raise unwritable(path, e) from None
    found = [path / f"samples_{task.replace('/', '_')}.jsonl" for task in lines]
    for file, of_task in zip(found, lines.values(), strict=True):
        write_bytes(file, b"".join(of_task))
    return found


def _line(task: str, *, dense: Mapping[str, Any], planned: Mapping[str, Any]) -> bytes:
    from lm_eval.utils import handle_non_serializable

    assert (dense["doc_id"], dense["filter"]) == (planned["doc_id"], planned["filter"])
    own = {*OF_A_MODEL, *dense["metrics"]}
    both = {"task": task} | {key: value for key, value in dense.items() if key not in own | {"metrics"}}
    models = {
        name: {key: sample[key] for key in (*OF_A_MODEL, *sample["metrics"])}
        for name, sample in (("dense", dense), ("planned", planned))
    }
    text = json.dumps(both | models, default=handle_non_serializable, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"  # half a character becomes its escape, which JSON knows
