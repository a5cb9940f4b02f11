"""The planned model against the dense one on lm-eval tasks."""

import hashlib
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from spd_calib.formats.files import dumps, sha256_of
from spd_calib.formats.plan import Plan
from spd_calib.formats.results import Results
from spd_calib.models.plan_files import load_drops

from .opening import Model, document_of, open_model_of, resolved_for
from .options import RunOptions
from .progress import SILENT, Progress
from .provenance import provenance
from .recovered import load_original
from .tasks import TaskOptions


def evaluate(
    plan: Plan | Path | str,
    *,
    tasks: TaskOptions,
    model: Model | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    run: RunOptions = RunOptions(),
    progress: Progress = SILENT,
) -> Results:
    """Run lm-eval tasks on the dense and the planned model: both scores, the paired difference and its error.

    `model` says where the model is in place of the plan, or is the model in memory; then `tokenizer` is needed. The
    dtype and the seed are the plan's unless given. Raises InputError where the plan, the model or a task cannot be
    used, or lm-eval fails.
    """
    document, path = document_of(Plan, plan)
    session = open_model_of(document, path=path, model=model, tokenizer=tokenizer)
    made = document.provenance
    resolved = replace(resolved_for(session, run, dtype=made.dtype), seed=made.seed)
    suite = tasks.load(seed=resolved.seed)
    drops = load_drops(document, path)
    lm = session.load(resolved.device, str(resolved.dtype), seed=resolved.seed)
    original = load_original(document, resolved, path=path) if document.recovered_from else None
    progress.expect(2 * suite.requests)
    results = suite.evaluate(lm, session.tokenizer, drops, resolved.batch_size, progress.step, original)
    if suite.truncated:
        progress.say("some requests were longer than the model reads: their beginnings were cut off")
    return Results(
        model=document.model,
        tensor_parallel=document.tensor_parallel,
        plan_sha256=sha256_of(path) if path else hashlib.sha256(dumps(document).encode()).hexdigest(),
        dropped=document.drops.blocks("attention"),
        limit=tasks.limit,
        tasks=results,
        provenance=provenance(resolved),
    )
