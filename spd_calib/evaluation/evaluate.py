"""`eval`: the planned model beside the dense one on lm-eval tasks, from a plan's file to a file of results."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from spd_calib.formats.common import Provenance
from spd_calib.formats.files import check_writable, dumps, read, sha256_of, write_text
from spd_calib.formats.plan import Plan
from spd_calib.formats.results import LmEval, Results, Seeds
from spd_calib.parallel.compensation import load_compensation
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.parallel.session import Session, open_session, versions
from spd_calib.ranks import world_size
from spd_calib.sensitivity.journal import Journal

from .harness import TaskSuite
from .options import EvalOptions
from .portions import requests_hash
from .samples import check_log_writable, write_log

Progress = Callable[[int, int, str], None]  # told requests answered, requests in all, and what is being done
Say = Callable[[str], None]  # told, in a sentence, what a person should know


def no_progress(done: int, total: int, words: str) -> None:
    """Do nothing: how far an evaluation is nobody wants to know."""


def say_nothing(words: str) -> None:
    """Do nothing: there is nobody to be told."""


def evaluate(
    plan_path: Path,
    *,
    tasks: Sequence[str],
    output: Path,
    include_path: Path | None = None,
    options: EvalOptions | None = None,
    log_samples: Path | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    command: str = "",
    resolve_model: Callable[[str], str] = str,
    progress: Progress = no_progress,
    say: Say = say_nothing,
) -> Results:
    """Run lm-eval's `tasks` on a plan's dense model and on the planned one; return the results, written to `output`.

    `options` are lm-eval's, with lm-eval's defaults. `log_samples` is a folder, or a file ending in .jsonl, for what
    both models said of every document (see write_log). `dtype` is the plan's unless given. `command` is kept in the
    file. `resolve_model` says where a model lies that a plan names. A run that was killed goes on where it stopped
    when called again, from a journal beside `output`, and gives the same bits.

    Raises InputError for a plan, model, task or option that cannot be used, for a journal of another run, and where
    lm-eval fails; SpdError where a disk is full.
    """
    plan, options = read(Plan, plan_path), options or EvalOptions()
    check_writable(output)
    if log_samples is not None:
        check_log_writable(log_samples)
    dtype = dtype or plan.provenance.dtype
    session = open_session(resolve_model(plan.model.id), plan.tensor_parallel.size, plan.model)
    suite = TaskSuite(tasks, include_path, options=options, tokenizer=session.tokenizer)
    if options.num_fewshot and (own := [name for name, shown in suite.loaded.shown.items() if shown == 0]):
        say(f"no few-shot examples are shown in {', '.join(own)}: lm-eval keeps to the 0 in a task's own configuration")
    described = _describe(options, session)
    plan_sha256 = sha256_of(plan_path)
    run = {
        "plan": plan_sha256,
        "model": session.ref.model_dump(mode="json", exclude={"id"}),
        "list of requests": requests_hash(suite.loaded.tasks.values()),
        "way of running lm-eval": [described.model_dump(mode="json"), options.max_batch_size],
        "device, dtype or number of real ranks": [device, dtype, world_size()],
        "version of spd-calib, torch or transformers": versions(),
    }
    journal = Journal(output.with_name(output.name + ".journal"), run)
    if journal.finished:
        say(f"going on from {journal.path}: {journal.finished} portions of the requests are finished")
    try:
        lm, original = _load(plan_path, plan, session=session, device=device, dtype=dtype, resolve_model=resolve_model)
        dense, planned = suite.run_dense_and_planned(
            lm,
            session.tokenizer,
            plan=plan,
            dense_lm=original,
            journal=journal,
            note=_counting(progress, 2 * suite.requests),
        )
        results = Results(
            model=plan.model,
            tensor_parallel=plan.tensor_parallel,
            plan_sha256=plan_sha256,
            dropped=plan.dropped,
            limit=options.limit,
            tasks=suite.compare(dense, planned),
            lm_eval=described,
            provenance=Provenance(
                command=command,
                seed=plan.provenance.seed,
                device=device,
                dtype=dtype,  # type: ignore[arg-type]
                versions=versions(),
            ),
        )
        if log_samples is not None:
            for path in write_log(log_samples, dense, planned):
                say(f"written: {path}")
        write_text(output, dumps(results))
        journal.remove()
    finally:
        journal.close()
    if dense.truncated or planned.truncated:
        say("some requests were longer than the model reads: their beginnings were cut off")
    return results


def _load(
    plan_path: Path, plan: Plan, *, session: Session, device: str, dtype: str, resolve_model: Callable[[str], str]
) -> tuple[TensorParallelLM, TensorParallelLM | None]:
    """Return the plan's model, its compensation loaded, and the dense one it was recovered from, if it was."""
    compensation, seed = load_compensation(plan, plan_path), plan.provenance.seed
    lm = session.load(device, dtype, seed)
    lm.set_compensation(compensation)
    if plan.recovered_from is None:
        return lm, None
    original = resolve_model(plan.recovered_from.id)
    return lm, open_session(original, session.tp, plan.recovered_from).load(device, dtype, seed)


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


def _counting(progress: Progress, total: int) -> Callable[[str], None]:
    """Return what counts the requests it is told of, and passes the count on."""
    done = 0

    def note(words: str) -> None:
        nonlocal done
        done += 1
        progress(done, max(done, total), words)

    return note
