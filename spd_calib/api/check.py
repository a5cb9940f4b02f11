"""Checking a plan: whether it is valid and of its model, and whether a runtime really runs it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

from spd_calib.errors import InputError, OtherModel, SpdError
from spd_calib.formats.drops import SUBLAYERS
from spd_calib.formats.phases import ByPhase
from spd_calib.formats.plan import Plan
from spd_calib.models.plan_files import check_one_choice, load_by_phase
from spd_calib.parallel.session import Session
from spd_calib.runtimes.checks import CheckRow

from .opening import Model, document_of, open_model_of
from .options import RunOptions
from .progress import SILENT, Progress

Runtime = Literal["torchrun", "vllm"]
PROMPTS = (
    "One day Mia and Tom meet in the park. Mia has a red ball.",
    "The ranks of a tensor-parallel model each hold their own heads, and",
    "def mean(values):\n    return",
)


@dataclass(frozen=True)
class CheckResult:
    """The rows of a check: of the plan itself and, where a runtime was asked for, of what that did."""

    rows: list[CheckRow]

    @property
    def ok(self) -> bool:
        return not self.wrong

    @property
    def wrong(self) -> list[CheckRow]:
        """Return the rows that do not hold."""
        return [row for row in self.rows if not row.ok]


def check(
    plan: Plan | Path | str,
    *,
    runtime: Runtime | None = None,
    model: Model | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    prompts: Sequence[str] = PROMPTS,
    new_tokens: int = 16,
    as_served: Sequence[str] | None = None,
    run: RunOptions = RunOptions(),
    progress: Progress = SILENT,
) -> CheckResult:
    """Check a plan against its model's form and weights and, with `runtime`, run it there beside the dense model.

    What a runtime does is compared with the simulation: log-probabilities, all-reduces and, on torchrun, the bits of
    the ranks' residual streams. What it does otherwise than planned is in the result, not raised.

    Args:
        plan: the document, or the path of its file; a runtime needs the file.
        runtime: 'torchrun' or 'vllm', which must be installed.
        model: where the model is, or the model itself (default: where the plan says).
        tokenizer: of a model in memory.
        prompts: texts that the runtime continues.
        new_tokens: tokens generated behind each, the likeliest ones.
        as_served: arguments of `vllm serve`. The engine that they make is judged, in its own dtype, compiled or not, on
            tokens that it samples; without them it is one in float32, compared to the fourth digit.
        run: device and dtype (default float32) of a check on torchrun; vLLM takes float32 and a device of its own.
        progress: callbacks, told how far it is.

    Raises:
        SpdError: the plan is of another model, or a runtime fails.
        InputError: plan, model or runtime cannot be used.
    """
    if runtime not in (None, "torchrun", "vllm"):
        known = "; SGLang runs plans by its plugin, and nothing checks yet that it does (docs/runtimes.md)"
        raise InputError(f"`runtime` {runtime!r} is neither torchrun nor vllm{known * (runtime == 'sglang')}.")
    if as_served is not None and runtime != "vllm":
        raise InputError("`as_served` are the arguments of an engine of vLLM's; give `runtime` vllm with them.")
    document, path = document_of(Plan, plan)
    drops = load_by_phase(document, path)
    if runtime == "vllm":
        check_one_choice(document, path)
    try:
        session = open_model_of(document, path=path, model=model, tokenizer=tokenizer)
    except OtherModel as e:
        raise SpdError(str(e)) from None  # whether they fit was the question, and this is the answer
    session.check_fits(drops, [block.module for block in document.blocks])
    rows = _rows_of_plan(document, drops)
    if runtime is not None:
        if not prompts:
            raise InputError("A runtime is checked on what it continues; give some `prompts`.")
        if path is None:
            raise InputError("A runtime reads the plan from its file; give the path of the plan.")
        progress.step(f"{runtime}, {session.tp} ranks")
        rows += _rows_of_runtime(runtime, session, path=path, drops=drops, prompts=prompts,
                                 new_tokens=new_tokens, as_served=as_served, run=run)  # fmt: skip
    return CheckResult(rows)


def _rows_of_plan(plan: Plan, drops: ByPhase) -> list[CheckRow]:
    """Return the rows of what has held by the time that plan and model are open."""
    blocks, dense = plan.model.num_blocks, len(SUBLAYERS) * plan.model.num_blocks
    planned = f"{dense - len(drops.decode)} planned"
    if plan.in_two_phases:
        planned = f"{dense - len(drops.prefill)} planned in prefill, {dense - len(drops.decode)} in decoding"
    return [
        CheckRow("the file", "a valid plan", f"format {plan.format}, version {plan.version}", True),
        CheckRow("the model", f"{plan.model.architecture}, {blocks} blocks", "the same", True),
        CheckRow("its weights", f"{plan.model.weight_fingerprint[:16]}…", "the same", True),
        CheckRow("TP size", str(plan.tensor_parallel.size), "divides heads and neurons", True),
        CheckRow("all-reduces per forward", f"{dense} dense", planned, True),
    ]


def _rows_of_runtime(
    runtime: Runtime,
    session: Session,
    *,
    path: Path,
    drops: ByPhase,
    prompts: Sequence[str],
    new_tokens: int,
    as_served: Sequence[str] | None,
    run: RunOptions,
) -> list[CheckRow]:
    resolved = run.resolved()
    if runtime == "torchrun":
        from spd_calib.runtimes.torchrun.check import check_torchrun

        return check_torchrun(session, path, drops=drops, prompts=prompts, new_tokens=new_tokens,
                              device=resolved.device, dtype=str(resolved.dtype))  # fmt: skip
    from spd_calib.runtimes.vllm.as_served import check_as_served
    from spd_calib.runtimes.vllm.check import check_vllm

    one_choice = drops.decode  # which vLLM is given in prefill, too: check has refused any other
    if as_served is not None:
        return check_as_served(
            session, path, drops=one_choice, prompts=prompts, new_tokens=new_tokens, arguments=as_served
        )
    if resolved.dtype != "float32":
        raise InputError(f"vLLM is checked in float32, not in {resolved.dtype}; leave `dtype` out.")
    return check_vllm(session, path, drops=one_choice, prompts=prompts, new_tokens=new_tokens)
