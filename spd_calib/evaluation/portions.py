"""A model's answers, kept portion by portion, so that an evaluation that was killed goes on where it stopped.

The requests are cut into portions in a way that does not depend on what is finished, and every portion is put to the
model by itself, in the same batches: a run that was resumed gives the same bits as one that was not.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from spd_calib.errors import InputError
from spd_calib.ranks import world_size
from spd_calib.sensitivity.journal import MeasurementJournal

from .quiet import Step

KINDS = ("loglikelihood", "loglikelihood_rolling", "generate_until")
BATCHES = 16  # of a portion, which is then a few seconds' work, and little of it padding
LEAST = 64  # requests of a portion


@dataclass(frozen=True)
class Kept:
    """The place where answers are kept: a journal, and in it the name of the model that gives them."""

    journal: MeasurementJournal
    name: str


def requests_hash(tasks: Iterable[Any]) -> str:
    """Return the sha256 over every request of lm-eval's `tasks`: its task, document, kind and arguments."""
    digest = hashlib.sha256()
    for task in tasks:
        for r in task.instances:
            what = [r.task_name, r.doc_id, r.idx, r.repeats, r.request_type, r.arguments]
            digest.update(json.dumps(what, default=str, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def keep_answers(model: Any, kept: Kept | None, *, warnings: list[str], step: Step) -> None:
    """Have `model`, an HFLM of lm-eval, look for its answers in what is kept, and keep those it must compute.

    `warnings` is the list that requests too long for the model are reported in. `step` is called for every answer that
    was found: lm-eval itself counts the others. A batch size of "auto" becomes, for every kind of request, the largest
    that the memory holds, found once: a run that is resumed must go on with it.
    """
    for kind in KINDS:
        ask = partial(_answer, model, getattr(model, kind), kind=kind, kept=kept, warnings=warnings, step=step)
        setattr(model, kind, ask)


def _answer(
    model: Any, ask: Any, requests: Sequence[Any], *, kind: str, kept: Kept | None, warnings: list[str], step: Step
) -> list[Any]:
    """Return the answers to lm-eval's `requests`, all of one kind, which `ask` would compute."""
    automatic = model.batch_size_per_gpu == "auto"
    if automatic:
        model.batch_size_per_gpu = _batch_size(model, kind, kept=kept, requests=requests)
    try:
        if kept is None:
            return ask(requests)
        portions = _portions(kind, requests, size=max(LEAST, BATCHES * model.batch_size_per_gpu))
        answers: list[Any] = []
        for number, portion in enumerate(portions):
            answers += _of_portion(kept, (kind, number), ask=ask, portion=portion, warnings=warnings, step=step)
        return [tuple(answer) for answer in answers] if kind == "loglikelihood" else answers
    finally:
        if automatic:
            model.batch_size_per_gpu = "auto"


def _of_portion(
    kept: Kept, key: tuple[str, int], *, ask: Any, portion: Sequence[Any], warnings: list[str], step: Step
) -> list[Any]:
    before, computed = len(warnings), False

    def compute() -> dict[str, Any]:
        nonlocal computed
        computed = True
        return {"answers": ask(portion), "truncated": len(warnings) > before}

    found = kept.journal.once([kept.name, *key], compute)
    if not computed:
        if found["truncated"]:
            warnings.append("some requests of a portion kept")
        for _ in portion:
            step()
    return found["answers"]


def _portions(kind: str, requests: Sequence[Any], *, size: int) -> list[Sequence[Any]]:
    """Cut `requests` into runs of at least `size`, those of one document together.

    Answers that are sampled stay together: each draws from where the one before it left the random numbers.
    """
    if kind == "generate_until" and any(map(_sampled, requests)):
        return [requests]
    found: list[list[Any]] = []
    last = None
    for r in requests:
        if not found or (len(found[-1]) >= size and (r.task_name, r.doc_id) != last):
            found.append([])
        found[-1].append(r)
        last = (r.task_name, r.doc_id)
    return list(found)


def _sampled(request: Any) -> bool:
    arguments = request.args[1]
    return bool(arguments.get("do_sample", arguments.get("temperature", 0.0) != 0.0))


def _batch_size(model: Any, kind: str, *, kept: Kept | None, requests: Sequence[Any]) -> int:
    """Return the largest batch that the memory holds, as lm-eval finds it.

    Of log-likelihoods the longest request is tried, of everything else as many tokens as the model reads. Raises
    InputError on real ranks, where the memory of one may end in the middle of an all-reduce that others wait in.
    """
    if world_size() > 1:
        raise InputError("A batch size of auto is found on simulated ranks alone; under torchrun give a number.")

    def find() -> dict[str, int]:
        if kind != "loglikelihood":
            return {"size": model._detect_batch_size()}
        longest = max((model.tok_encode("".join(r.args)) for r in requests), key=len)
        return {"size": model._detect_batch_size([(None, longest, [])])}

    return int((find() if kept is None else kept.journal.once([kept.name, kind, "batch size"], find))["size"])
