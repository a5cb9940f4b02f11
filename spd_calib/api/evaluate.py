"""The planned model against the dense one on lm-eval tasks."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from spd_calib.evaluation.options import EvalOptions
from spd_calib.formats.files import sha256_as_written, sha256_of
from spd_calib.formats.plan import Plan
from spd_calib.formats.results import LmEval, Results, Seeds
from spd_calib.models.plan_files import check_one_choice, load_drops
from spd_calib.parallel.session import Session, versions
from spd_calib.ranks import world_size
from spd_calib.sensitivity.journal import MeasurementJournal

from .opening import Model, document_of, open_model_of, resolved_for
from .options import RunOptions
from .progress import SILENT, Progress
from .provenance import provenance
from .recovered import load_original
from .tasks import TaskOptions


def evaluate(
    plan: Plan | Path | str,
    *,
    tasks: TaskOptions | str | Sequence[str],
    model: Model | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    journal: Path | None = None,
    log_samples: Path | None = None,
    run: RunOptions = RunOptions(),
    progress: Progress = SILENT,
) -> Results:
    """Run lm-eval tasks on the dense and the planned model: both scores, the paired difference and its error.

    Args:
        plan: as `plan` returned it, or its file.
        tasks: the names of lm-eval tasks, or TaskOptions, which say how lm-eval runs them (its own defaults else).
        model: where the model is, in place of what the plan says, or the model in memory; then `tokenizer` is needed.
        journal: a file that keeps what was answered, so that a run that was killed goes on when called again, to the
            same bits. It stays; remove it once the results are written.
        log_samples: a folder, or a file ending in .jsonl, for what both models said of every document.
        run: device and dtype (default: the plan's). The batch size is of `tasks`.
        progress: callbacks, told how far it is.

    Raises InputError where the plan, the model or a task cannot be used, for a journal of another evaluation, or where
    lm-eval fails; SpdError where a disk is full.
    """
    from spd_calib.evaluation.samples import check_log_writable, write_log  # imports lm-eval, which takes seconds

    if log_samples is not None:
        check_log_writable(log_samples)
    asked = tasks if isinstance(tasks, TaskOptions) else TaskOptions.of(tasks)
    document, path = document_of(Plan, plan)
    check_one_choice(document, path)
    session = open_model_of(document, path=path, model=model, tokenizer=tokenizer)
    made = document.provenance
    resolved = replace(resolved_for(session, run, dtype=made.dtype), seed=made.seed)
    suite = asked.load(tokenizer=session.tokenizer)
    if asked.options.num_fewshot and (own := [name for name, shown in suite.loaded.shown.items() if shown == 0]):
        progress.say(
            f"no few-shot examples are shown in {', '.join(own)}: lm-eval keeps to the 0 in a task's own configuration"
        )
    described = _describe(asked.options, session)
    plan_sha256 = sha256_of(path) if path else sha256_as_written(document)
    identity = _identity(
        suite, session, run=resolved, plan_sha256=plan_sha256, options=asked.options, lm_eval=described
    )
    drops = load_drops(document, path)
    with nullcontext() if journal is None else MeasurementJournal(journal, identity) as kept:
        if kept is not None and kept.finished:
            progress.say(f"going on from {kept.path}: {kept.finished} portions of the requests are finished")
        lm = session.load(resolved.device, str(resolved.dtype), seed=resolved.seed, drops=drops)
        original = load_original(document, resolved, path=path) if document.recovered_from else None
        progress.expect(2 * suite.requests)
        dense, planned = suite.run_dense_and_planned(
            lm, session.tokenizer, drops=drops, dense_lm=original, journal=kept, note=progress.step
        )
    results = Results(
        model=document.model,
        tensor_parallel=document.tensor_parallel,
        plan_sha256=plan_sha256,
        dropped=document.drops.blocks("attention"),
        mlp_dropped=document.drops.blocks("mlp"),
        limit=asked.options.limit,
        tasks=suite.compare(dense, planned),
        lm_eval=described,
        provenance=provenance(resolved),
    )
    if log_samples is not None:
        for written in write_log(log_samples, dense=dense, planned=planned):
            progress.say(f"written: {written}")
    if dense.truncated or planned.truncated:
        progress.say("some requests were longer than the model reads: their beginnings were cut off")
    return results


def _identity(
    suite: Any, session: Session, *, run: RunOptions, plan_sha256: str, options: EvalOptions, lm_eval: LmEval
) -> dict[str, Any]:
    """Return what must be the same for a journal to go on from."""
    from spd_calib.evaluation.portions import requests_hash

    return {
        "plan": plan_sha256,
        "model": session.ref.model_dump(mode="json", exclude={"id"}),
        "list of requests": requests_hash(suite.loaded.tasks.values()),
        "way of running lm-eval": [lm_eval.model_dump(mode="json"), options.max_batch_size],
        "device, dtype or number of real ranks": [run.device, run.dtype, world_size()],
        "version of spd-calib, torch or transformers": versions(),
    }


def _describe(options: EvalOptions, session: Session) -> LmEval:
    """Return what stands in the file of how lm-eval was run."""
    template = json.dumps(session.tokenizer.chat_template) if options.apply_chat_template else None
    return LmEval(
        lm_eval_version=version("lm_eval"),
        num_fewshot=options.num_fewshot,
        apply_chat_template=options.apply_chat_template,
        fewshot_as_multiturn=options.multiturn,
        chat_template_sha256=None if template is None else hashlib.sha256(template.encode()).hexdigest(),
        system_instruction=options.system_instruction,
        gen_kwargs=dict(options.gen_kwargs),
        model_args=dict(options.model_args),
        metadata=dict(options.metadata),
        samples=None if options.samples is None else {task: list(found) for task, found in options.samples.items()},
        seeds=Seeds(**dataclasses.asdict(options.seeds)),
        batch_size=options.batch_size,
    )
