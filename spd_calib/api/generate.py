"""Text that a planned model writes, beside the dense model's."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

from spd_calib.formats.phases import NOTHING_DROPPED_IN_BOTH, ByPhase
from spd_calib.formats.plan import Plan
from spd_calib.models.plan_files import load_by_phase
from spd_calib.parallel.generate import continue_text
from spd_calib.parallel.model import TensorParallelLM

from .opening import Model, document_of, open_model_of, resolved_for
from .options import RunOptions
from .progress import SILENT, Progress
from .recovered import load_original

Written = Literal["dense", "plan"]


@dataclass(frozen=True)
class Continuation:
    """A prompt and the text behind it, together in `text`, as the dense or the planned model wrote it."""

    model: Written
    prompt: str
    text: str


def generate(
    plan: Plan | Path | str,
    prompts: Sequence[str],
    *,
    model: Model | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    new_tokens: int = 64,
    temperature: float = 0.0,
    dense: bool = False,
    run: RunOptions = RunOptions(),
    progress: Progress = SILENT,
) -> list[Continuation]:
    """Continue each prompt by up to `new_tokens` tokens: the likeliest at temperature 0, else drawn by `run`'s seed.

    Runs on simulated ranks or, under torchrun, on real ones.

    Args:
        plan: the document, or the path of its file.
        prompts: texts to go on from.
        model: where the model is, or the model itself (default: where the plan says).
        tokenizer: of a model in memory.
        new_tokens: tokens written behind each prompt, at most.
        temperature: what the logits are divided by before a token is drawn.
        dense: the dense model writes, too, and first; for a recovered checkpoint the one that it was made from.
        run: device, dtype (default: the plan's) and seed.
        progress: callbacks, told how far it is.

    Raises:
        InputError: a prompt holds no token or is too long for the model, or plan or model cannot be used.
    """
    document, path = document_of(Plan, plan)
    session = open_model_of(document, path=path, model=model, tokenizer=tokenizer)
    resolved = resolved_for(session, run, dtype=document.provenance.dtype)
    for prompt in prompts:
        session.prompt_ids(prompt, new_tokens=new_tokens)  # it may be refused
    planned = load_by_phase(document, path)
    lm = session.load(resolved.device, str(resolved.dtype), seed=resolved.seed, stream=resolved.stream, drops=planned)
    writers: list[tuple[Written, TensorParallelLM, ByPhase]] = [("plan", lm, planned)]
    if dense:
        original = load_original(document, resolved, path=path) if document.recovered_from else lm
        writers.insert(0, ("dense", original, NOTHING_DROPPED_IN_BOTH))
    progress.expect(len(writers) * len(prompts))
    written = []
    for name, writer, drops in writers:
        with writer.running(drops):
            for prompt in prompts:
                text = continue_text(writer, session.tokenizer, prompt=prompt, new_tokens=new_tokens,
                                     temperature=temperature, seed=resolved.seed)  # fmt: skip
                written.append(Continuation(name, prompt, text))
                progress.step("")
    return written
