"""lm-eval tasks by name: found, loaded, and their requests built once, quietly and without a network where possible."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import PreTrainedTokenizerBase

from spd_calib.errors import InputError

from .options import EvalOptions
from .quiet import first_line, quiet

LIST_THEM = "`spd-calib lm-eval ls tasks` lists all, and a folder to include adds your own"


@dataclass(frozen=True)
class Loaded:
    """lm-eval's tasks and groups by name, every task's requests built.

    `documents`, by task, are the indices of those evaluated where they are not simply the first. `shown` is the number
    of few-shot examples in each task's requests.
    """

    tasks: Mapping[str, Any]
    groups: Mapping[str, Any]
    documents: Mapping[str, list[int]]
    shown: Mapping[str, int]


def load_tasks(
    names: Sequence[str],
    include_path: Path | None,
    *,
    options: EvalOptions,
    tokenizer: PreTrainedTokenizerBase | None = None,
    half: int | None = None,
) -> Loaded:
    """Load lm-eval tasks and build the requests of the documents that `options` names.

    `names` are lm-eval's: tasks, groups, tags, patterns such as arc_*, or paths of YAML files. With `half` 0 or 1 only
    every second document is used, from the first or from the second on. The requests are the same in every run: the
    few-shot examples are drawn once. Only a chat template needs the `tokenizer`.

    Raises InputError for tasks that cannot be found, reached or run, and for a tokenizer without a chat template.
    """
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise InputError(f"No task is named; {LIST_THEM}.")
    if include_path is not None and not include_path.is_dir():
        raise InputError(f"There is no folder {include_path} of tasks; name one that holds lm-eval's YAML files.")
    chat = _chat_template(tokenizer, options.model_args) if options.apply_chat_template else None
    found: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}}
    with quiet():
        manager = _manager(names, include_path=include_path, metadata=options.metadata)
        for name in _known(names, manager):
            for kind, of_kind in _load(manager, name).items():
                if kind in found:
                    found[kind].update(of_kind)
        tasks, groups = found["tasks"], found["groups"]
        documents = _documents(tasks, options, half=half)
        shown = {name: _configure(task, options) for name, task in tasks.items()}
        for name, task in tasks.items():
            _build_requests(name, task, options=options, documents=documents.get(name), chat=chat)
    return Loaded(tasks, groups, documents, shown)


def _chat_template(tokenizer: PreTrainedTokenizerBase | None, model_args: Mapping[str, Any]) -> Callable[..., str]:
    """Return what lm-eval's model `hf` writes a conversation with, which takes its tokenizer and no weights."""
    from lm_eval.models.huggingface import HFLM

    if tokenizer is None or not tokenizer.chat_template:
        raise InputError("The model's tokenizer has no chat template; leave it out, or add one to the tokenizer.")
    arguments = dict(model_args.get("chat_template_args") or {})
    if model_args.get("enable_thinking") is not None:
        arguments["enable_thinking"] = model_args["enable_thinking"]
    return partial(HFLM.apply_chat_template, SimpleNamespace(tokenizer=tokenizer, chat_template_args=arguments))


def _manager(names: Sequence[str], *, include_path: Path | None, metadata: Mapping[str, Any]) -> Any:
    """Return lm-eval's task manager; its own 14,000 tasks take seconds to read: left out where none is named."""
    from lm_eval.tasks import TaskManager

    more = {"metadata": dict(metadata)} if metadata else {}
    if include_path is not None:
        own = TaskManager(include_path=include_path, include_defaults=False, **more)
        if set(names) <= set(own.all_subtasks):
            return own
    return TaskManager(include_path=include_path, **more)


def _known(names: Sequence[str], manager: Any) -> list[str]:
    """Return the names with patterns replaced by what they match. Raises InputError for one that matches nothing."""
    known: list[str] = []
    for name in names:
        matching = [name] if name in manager.task_index or Path(name).is_file() else manager.match_tasks([name])
        if not matching:
            close = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f" (perhaps {close[0]}?)" if close else ""
            raise InputError(f"lm-eval knows no task {name!r}{hint}; {LIST_THEM}.")
        known += [m for m in matching if m not in known]
    return known


def _load(manager: Any, name: str) -> Any:
    try:
        return manager.load([name])
    except Exception as e:
        from datasets.exceptions import DatasetNotFoundError

        if isinstance(e, ConnectionError | DatasetNotFoundError) or "offline" in type(e).__name__.lower():
            raise InputError(
                f"The data of task {name} cannot be reached ({first_line(e)}); get it where there is a network, or "
                "name a task with local data and the folder it lies in."
            ) from e
        raise InputError(f"The task {name} cannot be loaded: {first_line(e)}; correct it or leave it out.") from e


def _documents(tasks: Mapping[str, Any], options: EvalOptions, *, half: int | None) -> dict[str, list[int]]:
    """Return the indices of the documents evaluated, of each task where they are not simply the first."""
    if options.samples is not None:
        if missing := [name for name in options.samples if name not in tasks]:
            raise InputError(f"Documents are named of {missing[0]}, which is none of the tasks {', '.join(tasks)}.")
        if without := [name for name in tasks if not options.samples.get(name)]:
            raise InputError(f"No documents are named of the task {without[0]}; name some, or leave the task out.")
        found = {name: sorted(options.samples[name]) for name in tasks}
        for name, task in tasks.items():
            if found[name][-1] >= (length := len(task.eval_docs)):
                raise InputError(f"The task {name} has {length} documents, and none of index {found[name][-1]}.")
    elif half is not None:
        found = {name: list(range(_limit(task, options) or len(task.eval_docs))) for name, task in tasks.items()}
    else:
        return {}
    return found if half is None else {name: documents[half::2] for name, documents in found.items()}


def _limit(task: Any, options: EvalOptions) -> int | None:
    """Return how many of a task's documents are evaluated, a share counted as lm-eval counts it; None for all."""
    from lm_eval.evaluator_utils import get_sample_size

    limit = get_sample_size(task, options.limit)
    return None if limit is None else min(limit, len(task.eval_docs))


def _configure(task: Any, options: EvalOptions) -> int:
    """Set in a task what lm-eval's `simple_evaluate` does; return its number of few-shot examples."""
    if options.gen_kwargs and task.get_config("output_type") == "generate_until":
        task.set_config(key="generation_kwargs", value=dict(options.gen_kwargs), update=True)
    own = task.get_config("num_fewshot")
    if own is None or (own != 0 and options.num_fewshot is not None):  # a 0 of the task's own is never overwritten
        task.set_config(key="num_fewshot", value=options.num_fewshot or 0)
    task.set_fewshot_seed(seed=options.seeds.fewshot)
    return int(task.get_config("num_fewshot"))


def _build_requests(
    name: str, task: Any, *, options: EvalOptions, documents: list[int] | None, chat: Callable[..., str] | None
) -> None:
    """Build a task's requests, for good: lm-eval would draw other few-shot examples each time it is asked."""
    if getattr(task, "UNSAFE_CODE", False):
        raise InputError(
            f"The task {name} runs code that the model writes, which is unsafe; leave it out, or run it with "
            "`spd-calib lm-eval run --model spd_calib --confirm_run_unsafe_code` where no harm can be done."
        )
    if getattr(task, "MULTIMODAL", False):
        raise InputError(f"The task {name} needs images or sound, and the model reads text alone; leave it out.")
    if documents is not None and options.samples is None and len(documents) < 2:
        raise InputError(f"The task {name} has too few documents to choose by the one half and verify on the other.")
    try:
        task.build_all_requests(
            limit=None if documents else _limit(task, options),
            samples=documents,
            system_instruction=options.system_instruction,
            apply_chat_template=chat is not None,
            fewshot_as_multiturn=options.multiturn,
            chat_template=chat,
        )
    except Exception as e:
        raise InputError(f"The requests of task {name} cannot be built: {first_line(e)}; leave it out.") from e
    task.build_all_requests = lambda **_: None
