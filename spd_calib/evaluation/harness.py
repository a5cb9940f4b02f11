"""The planned model against the dense one on lm-eval tasks: both scores, and their paired difference.

Both run on the same loaded model and the same requests, so that document by document only the sync points differ:
the difference's standard error is the paired one, far below that of either score.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from spd_calib.errors import InputError
from spd_calib.formats.drops import NOTHING_DROPPED, Drops
from spd_calib.formats.results import TaskResult
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.sensitivity.journal import MeasurementJournal

from .options import EvalOptions
from .portions import Kept, keep_answers
from .quiet import drawing_from, quiet, random_state, running, watching_truncation
from .scores import Key, Score, compare, group_scores, paired_stderr, task_scores
from .shared_contexts import share_contexts
from .tasks import load_tasks

Note = Callable[[str], None]  # told, in words, how far a run is


def no_note(words: str) -> None:
    """Do nothing with a note."""


@dataclass(frozen=True)
class Outcome:
    """The result of one model on the tasks: every score, and what lm-eval logs of every document, by task.

    `truncated` tells whether requests were too long for the model and lost their beginning.
    """

    scores: Mapping[Key, Score]
    samples: Mapping[str, list[dict[str, Any]]]
    truncated: bool


class TaskSuite:
    """lm-eval tasks, loaded once, to be run on many models or many settings of one.

    `half` and the `tokenizer`, and what is raised, are load_tasks'.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        include_path: Path | None,
        *,
        options: EvalOptions | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        half: int | None = None,
    ):
        self.options = options or EvalOptions()
        with drawing_from(self.options.seeds):
            self.loaded = load_tasks(tasks, include_path, options=self.options, tokenizer=tokenizer, half=half)
            self.random_state = random_state(self.options.seeds)  # lm-eval's, too, goes on to the model from here
        self.names = list(self.loaded.tasks)
        self.requests = sum(i.repeats for task in self.loaded.tasks.values() for i in task.instances)

    def run(
        self,
        lm: TensorParallelLM,
        tokenizer: PreTrainedTokenizerBase,
        *,
        note: Note = no_note,
        kept: Kept | None = None,
    ) -> Outcome:
        """Return every score of every task, then of every group, of `lm` under what it runs now.

        Answers that are kept already are not computed again. Raises InputError where lm-eval fails.
        """
        from lm_eval.evaluator import evaluate as lm_eval
        from lm_eval.models.huggingface import HFLM

        done = 0

        def step() -> None:
            nonlocal done
            done += 1
            note(f"{done} of {max(done, self.requests)} requests")

        options, tasks, groups = self.options, self.loaded.tasks, self.loaded.groups
        for task in tasks.values():
            for instance in task.instances:
                instance.resps, instance.filtered_resps = [], {}
        numbers = lm.refusing_nonfinite()
        with running(self.names), numbers, quiet(step), drawing_from(self.random_state), watching_truncation() as long:
            model = HFLM(
                pretrained=lm.model,
                tokenizer=tokenizer,
                batch_size=options.batch_size,
                max_batch_size=options.max_batch_size,
                **options.model_args,
            )
            share_contexts(model, step=step)
            keep_answers(model, kept, warnings=long, step=step)
            documents = self.loaded.documents
            which = {"samples": documents} if documents else {"limit": options.limit}
            found: Any = lm_eval(
                model, {"tasks": tasks, "groups": groups}, **which, bootstrap_iters=0, log_samples=True
            )
        scores: dict[Key, Score] = {}
        for name, task in tasks.items():
            scores.update(task_scores(name, task, found=found))
        for name, group in groups.items():
            scores.update(group_scores(name, group, found=found))
        return Outcome(scores, found["samples"], bool(long))

    def run_dense_and_planned(
        self,
        lm: TensorParallelLM,
        tokenizer: PreTrainedTokenizerBase,
        *,
        drops: Drops,
        dense_lm: TensorParallelLM | None = None,
        journal: MeasurementJournal | None = None,
        note: Note = no_note,
    ) -> tuple[Outcome, Outcome]:
        """Run the dense model, then `lm` under `drops`; return both outcomes.

        Where `lm` was recovered, `dense_lm` is the model it was made from; else the dense model is `lm` with every sync
        point kept. What `journal` holds is not computed again. `note` is told how far it is. Raises InputError where
        lm-eval fails.
        """

        def run(name: str, model: TensorParallelLM, run: Drops) -> Outcome:
            kept = None if journal is None else Kept(journal, name)
            with model.running(run):
                return self.run(model, tokenizer, note=partial(_note_of, note, name), kept=kept)

        return run("dense", dense_lm or lm, NOTHING_DROPPED), run("planned", lm, drops)

    def compare(self, dense: Outcome, planned: Outcome) -> list[TaskResult]:
        """Return every score of every task, then of groups, with its paired difference.

        Raises InputError where the plan breaks the model, or nothing of the tasks can be compared.
        """
        if results := compare(dense.scores, planned.scores, shown=self.loaded.shown):
            return results
        raise InputError(f"No metric of {', '.join(self.names)} says whether more of it is better; name other tasks.")

    def accuracy(self, lm: TensorParallelLM, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
        """Return, by task, the accuracy of `lm` under what it runs now: acc, or else the first metric to be maximised.

        Raises InputError for a task without one.
        """
        return {task: score.value for task, score in self._accuracies(lm, tokenizer).items()}

    def losing(
        self, lm: TensorParallelLM, dense: TensorParallelLM, *, tokenizer: PreTrainedTokenizerBase
    ) -> Callable[[], tuple[dict[str, float], dict[str, float]]]:
        """Return a function that measures the accuracy that `lm` loses by what it runs when the function is called.

        It returns, by task, the loss of accuracy (as in `accuracy`) against `dense` with every sync point kept, which
        is run once, and the paired standard error of the loss over documents.
        """
        before: dict[str, Score] = {}

        def lost() -> tuple[dict[str, float], dict[str, float]]:
            planned = self._accuracies(lm, tokenizer)
            if not before:
                with dense.running(NOTHING_DROPPED):
                    before.update(self._accuracies(dense, tokenizer))
            errors: dict[str, float] = {}
            for task, score in planned.items():
                if (error := paired_stderr(before[task], score)) is None:
                    raise InputError(f"The score of {task} is no mean over documents; leave the task out.")
                errors[task] = error
            return {task: before[task].value - score.value for task, score in planned.items()}, errors

        return lost

    def _accuracies(self, lm: TensorParallelLM, tokenizer: PreTrainedTokenizerBase) -> dict[str, Score]:
        scores = self.run(lm, tokenizer).scores
        accuracy: dict[str, Score] = {}
        for task in self.names:
            better = {metric: s for (name, metric), s in scores.items() if name == task and s.higher_is_better}
            if not better:
                raise InputError(f"The task {task} has no accuracy or other score to lose; leave it out.")
            accuracy[task] = better.get("acc", next(iter(better.values())))
        return accuracy


def _note_of(note: Note, name: str, words: str) -> None:
    note(f"{name}, {words}")
