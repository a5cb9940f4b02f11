"""Winning back what a plan costs: from a plan and text to a checkpoint with a plan in it."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from spd_calib.errors import InputError
from spd_calib.formats.common import Tier
from spd_calib.formats.drops import Drops, Point, Strategy
from spd_calib.formats.files import sha256_as_written, sha256_of
from spd_calib.formats.plan import Budget, Plan
from spd_calib.models.load import load_dense
from spd_calib.models.plan_files import check_one_choice, load_drops
from spd_calib.models.source import Source
from spd_calib.models.stream_load import load_streamed, must_stream
from spd_calib.parallel.comm import DistributedComm
from spd_calib.parallel.distributed import from_main_rank, local_device
from spd_calib.parallel.session import Session, versions
from spd_calib.planning.budget import cost, describe, kept
from spd_calib.planning.budget_options import Amount, fraction
from spd_calib.ranks import is_main_rank, world_size
from spd_calib.recovery import checkpoint
from spd_calib.recovery.block_tiers import drops_to_recover, tiers_of
from spd_calib.recovery.distillation import Schedule
from spd_calib.recovery.held_out import HeldOut
from spd_calib.recovery.journal import TensorJournal
from spd_calib.recovery.options import METHODS, WITHOUT_TRAINING, RecoveryMethod, RecoveryOptions
from spd_calib.recovery.planned_model import PlannedModel
from spd_calib.recovery.precision import bfloat16_slowdown
from spd_calib.recovery.recover import recover as treat
from spd_calib.recovery.recovered_plan import Measured, recovered_plan
from spd_calib.recovery.stored_form import check_can_be_written
from spd_calib.sensitivity.documents import TEXT
from spd_calib.sensitivity.norm_estimates import fit_estimates
from spd_calib.sensitivity.text import Text

from .opening import document_of, open_model_of, resolved_for
from .options import RunOptions, check_whole_numbers
from .progress import SILENT, Progress
from .provenance import provenance
from .replication import whole_blocks_for
from .text import TextSelection, load_texts_for

SLOWER = 1.5  # times: less may be noise
SPREAD = 4  # times as many packed sequences as are used are read, so that they are of more documents


def recover(
    plan: Plan | Path | str,
    output: Path | str,
    *,
    data: str | Path,
    model: str | Path | None = None,
    text: TextSelection = TextSelection(max_samples=512),
    methods: Sequence[str] = WITHOUT_TRAINING,
    max_rank: int | None = None,
    exchange: float = 1.0,
    tau1: float | None = None,
    tau2: float | None = None,
    steps: int = 200,
    final_steps: int = 200,
    rate: float = 0.01,
    mixed: bool = False,
    replicate: Amount | None = None,
    max_kl: Amount | None = None,
    max_ppl_increase: Amount | None = None,
    run: RunOptions = RunOptions(batch_size=16),
    progress: Progress = SILENT,
) -> Plan:
    """Treat the blocks that a plan drops, write the checkpoint into the new folder `output`, and return its plan.

    What is found on the way lies in OUTPUT.partial until it is done, from where a run that was killed goes on. Under
    torchrun the processes train together, and all return the plan that the main one writes.

    Args:
        plan: as `plan` returned it, or its file.
        output: a folder that does not exist, or is empty.
        data: the text to fit on: 'demo', a file, or a hub data set as NAME:CONFIG:SPLIT.
        model: where the model is, in place of what the plan says.
        text: which sequences of it are used; a fifth of `max_samples` judges, the rest is fitted on. The lengths are by
            default those of the text that the plan was verified on.
        methods: some of 'grouping', 'compensation', 'refit' and 'distillation', which is left out by default.
        max_rank: bound on the predictors' rank; 0 allows the mean alone (default: the mean where refit does the
            rest; without it, behind norms and in mixtures of experts, the full predictor, too).
        exchange: what one per cent more weights of a block must explain, in per cent of what its ranks miss.
        tau1, tau2: blocks up to tau1 of KL are not trained. Without refit they are left alone, and, with distillation,
            blocks above tau2 alone are regrouped (default: see block_tiers).
        steps, final_steps: of training a block (0: none is trained alone), and of training all treated blocks together
            at the end.
        rate: of training, relative to each weight's size.
        mixed: train with bfloat16 matrix products in the blocks; weights, the loss and every judgement are as ever.
            Refused on a device that multiplies more slowly so.
        replicate: share of the weights a rank reads that it may read more, '7%': all heads of other ranks are
            replicated in as many blocks as that pays for, those that cost most after recovery.
        max_kl, max_ppl_increase: a budget for the recovered plan, one of them: as many blocks are given back to the
            dense model as must be to keep it on the text to judge by, with standard errors to spare.
        run: device, dtype (default: the plan's), batch size, seed; with `stream`, or where twice the weights do not
            fit into the memory that is free, blocks are read from disk as they are needed, and nothing can be trained.
        progress: callbacks, told how far it is.

    Raises InputError for a plan, a text or an option that cannot be used, SpdError where the disk refuses.
    """
    check_whole_numbers(0, max_rank=max_rank, steps=steps, final_steps=final_steps)
    if not 0 <= exchange < math.inf:
        raise InputError(f"`exchange` {exchange} is no share; give one in per cent, 0 or more.")
    options = RecoveryOptions(
        methods=_checked_methods(methods),
        max_rank=max_rank,
        exchange=exchange,
        batch_size=run.batch_size,
        seed=run.seed,
        block_schedule=Schedule(steps=steps, rate=rate, mixed=mixed, seed=run.seed),
        whole_schedule=Schedule(steps=final_steps, rate=rate, mixed=mixed, seed=run.seed),
    )
    if not 0 <= rate <= 1:
        raise InputError(f"`rate` {rate} is no learning rate; give a share of a weight's size, such as 0.01.")
    budget = _budget(max_kl, max_ppl_increase)
    output = Path(os.path.realpath(output))  # of a link the folder that it names; "." has a name then
    if model is not None and not isinstance(model, str | Path):
        raise InputError("Recovery writes a folder like the one the model came from; give that folder as `model`.")
    document, path = document_of(Plan, plan)
    check_one_choice(document, path)
    if document.drops.bits:
        raise InputError(
            "Recovery cannot fit weights through quantised syncs; recover a plan without them, then profile the "
            "checkpoint and plan with `sync_bits`."
        )
    if replicate is not None and document.drops.replicated:
        raise InputError("The plan replicates heads already; leave `replicate` out, or plan without.")
    (tiers, whence), drops = tiers_of(document, tau1=tau1, tau2=tau2), drops_to_recover(document)
    if "distillation" not in options.methods and not drops.blocks("attention"):
        raise InputError(
            "The plan drops MLPs' sync points alone, which nothing but training wins back; add distillation to the "
            "methods, or plan with attentions' sync points, too."
        )
    dropped = [drops.strategy(Point(block, "attention")) for block in drops.blocks("attention")]
    if dropped and Strategy.BLOCK_DROP not in dropped:
        raise InputError(
            "The plan drops attentions' sync points by plain_drop alone, which no treatment is for; plan with "
            "`strategy` block_drop."
        )
    checkpoint.check_output(output)
    session = open_model_of(document, path=path, model=model, replicas=True)
    heads = None if replicate is None else whole_blocks_for(drops, session=session, share=replicate)
    run = resolved_for(session, run, dtype=document.provenance.dtype)
    run = replace(run, device=local_device(run.device))
    trains = "distillation" in options.methods
    if mixed and trains:
        _check_mixed(run.device)
    run = replace(run, stream=_streams(session, run, trains=trains))
    found = load_texts_for(session, [str(data)], _like_the_plans(text, document), spread=SPREAD)[0]
    judged = max(2, len(found.calibration) // 5)
    fitting, judging = found.calibration[:-judged], found.calibration[-judged:]
    _announce(progress, found, judged=judged, tiers=tiers, whence=whence)
    planned = _load(session, run, drops | load_drops(document, path), progress=progress)
    _estimate_behind_norms(planned, document, fitting, batch_size=run.batch_size)
    identity = {
        "plan": sha256_of(path) if path else sha256_as_written(document),
        "text": found.calibration_ref().sha256,
        "options": repr(options),
        "dtype": run.dtype,
        "tiers": repr(tiers),
        "budget": repr(budget),
        "versions": versions(),
    }
    if heads:
        identity |= {"heads": repr(heads)}
        progress.say(f"heads to replicate in {heads.blocks} blocks: {100 * heads.share:.1f} % more weights to read")
    progress.expect(_steps_at_most(tiers, options, replicates=heads is not None, gives_back=budget is not None))
    made: Plan | None = None
    with TensorJournal(output.with_name(f"{output.name}.partial"), identity) as journal:
        report = treat(
            planned,
            fitting=fitting,
            held_out=judging,
            tiers=tiers,
            options=options,
            heads=heads,
            budget=budget,
            journal=journal,
            tick=progress.step,
            replicas=DistributedComm() if world_size() > 1 else None,
        )
        if is_main_rank():
            # so that what is verified is what is written; predictors are written in float32
            planned.round_to(checkpoint.storage_dtype(_source(session)))
            measured = Measured(
                judged=HeldOut(planned, judging, batch_size=run.batch_size).measure(),
                verified=HeldOut(planned, found.verification, batch_size=run.batch_size).measure(),
                text=found.verification_ref(),
            )
            made = checkpoint.write_checkpoint(
                output,
                planned,
                source=_source(session),
                make_plan=partial(
                    recovered_plan,
                    document,
                    planned,
                    report=report,
                    measured=measured,
                    budget=budget,
                    provenance=provenance(run),
                ),
                report=report.document(tiers_from=whence, documents=found.documents),
            )
            journal.remove()
            if budget and not kept(budget, made.verified):
                found_cost = describe(budget, cost(budget, made.verified))
                progress.say(f"on the text to verify on it costs {found_cost}, which is more than its budget")
    made = from_main_rank(made)
    assert made is not None
    return made


def _budget(max_kl: Amount | None, max_ppl_increase: Amount | None) -> Budget | None:
    """Return the budget asked for. Raises InputError for two."""
    if max_kl is not None and max_ppl_increase is not None:
        raise InputError("`max_kl` and `max_ppl_increase` are two budgets; give one.")
    strategies = [Strategy.BLOCK_DROP]
    if max_kl is not None:
        return Budget(kind="max_kl", value=fraction(max_kl, "max_kl"), strategies=strategies)
    if max_ppl_increase is not None:
        value = fraction(max_ppl_increase, "max_ppl_increase")
        return Budget(kind="max_ppl_increase", value=value, strategies=strategies)
    return None


def _checked_methods(methods: Sequence[str]) -> tuple[RecoveryMethod, ...]:
    """Return the methods, each once. Raises InputError for none, or one that is not known."""
    wrong = [m for m in methods if m not in METHODS]
    if wrong or not methods:
        raise InputError(f"`methods` {wrong[0] if wrong else ''!r} is none of {', '.join(METHODS)}.")
    return tuple(dict.fromkeys(methods))  # type: ignore[arg-type]


def _check_mixed(device: str) -> None:
    """Raise InputError where training with bfloat16 products would take longer, which is all that they are for."""
    if (slower := bfloat16_slowdown(device)) > SLOWER:
        raise InputError(
            f"`mixed`: on this {device} products of bfloat16 take {slower:.1f} times as long as those of float32; "
            "leave it out."
        )


def _source(session: Session) -> Source:
    assert session.source is not None, "a model in memory was refused"
    return session.source


def _streams(session: Session, run: RunOptions, *, trains: bool) -> bool:
    """Return whether the model is read from disk block by block.

    Raises InputError where it must be and cannot, and for a model that could not be written.
    """
    source, stream = _source(session), run.stream
    if stream and (trains or world_size() > 1):
        what = "`methods` distillation trains" if trains else "processes that train together hold"
        raise InputError(f"{what} a model that is in memory as a whole; leave `stream` out.")
    if not trains and world_size() == 1:
        stream = stream or must_stream(source, session.config, device=run.device, dtype=str(run.dtype))
    check_can_be_written(source, session.config, stream=stream)
    return stream


def _load(session: Session, run: RunOptions, drops: Drops, *, progress: Progress) -> PlannedModel:
    """Return the model, dense and planned."""
    source, config, dtype = _source(session), session.config, str(run.dtype)
    if not run.stream:
        return PlannedModel(load_dense(source, config, device=run.device, dtype=dtype), session.tp, drops)
    progress.say("the weights are read from disk, block by block, as they are needed")
    model, weights = load_streamed(source, config, device=run.device, dtype=dtype)
    return PlannedModel(model, session.tp, drops, hold=weights.hold)


def _like_the_plans(text: TextSelection, plan: Plan) -> TextSelection:
    """Return the selection with the lengths, where it has none, of the text that the plan was verified on."""
    used = plan.verified.text
    return replace(
        text,
        seq_len=text.seq_len or used.seq_len,
        min_len=text.min_len or (used.min_len if text.seq_len is None else None),
        pack=text.pack or used.pack,
        column=used.column if text.column == TEXT else text.column,
    )


def _estimate_behind_norms(
    planned: PlannedModel, plan: Plan, fitting: Sequence[Sequence[int]], *, batch_size: int
) -> None:
    """Give blocks that the plan keeps until they are treated the estimates behind norms that dropped ones came with."""
    waiting = [Point(block.index, "attention") for block in plan.blocks if block.recovery]
    if not waiting:
        return
    lm = planned.lm
    lm.estimates = fit_estimates(lm, fitting, batch_size=batch_size).only(waiting)
    drops = lm.fitted(planned.drops)
    for point in lm.estimates:
        planned.put(planned.as_dense(point.block, drops))


def _announce(progress: Progress, text: Text, *, judged: int, tiers: Mapping[int, Tier], whence: str) -> None:
    if text.note:
        progress.say(text.note)
    progress.say(whence + ": " + ", ".join(f"{block} {tier}" for block, tier in tiers.items()))
    progress.say(
        f"{len(text.calibration) - judged} sequences to fit on, {judged} to judge by, {len(text.verification)} to "
        "verify on"
    )


def _steps_at_most(tiers: Mapping[int, Tier], options: RecoveryOptions, *, replicates: bool, gives_back: bool) -> int:
    """Return how many steps there will be: training may end early, and treatments that do nothing are left out.

    Where heads are replicated, or, with refit, blocks given back before the end, those left are treated anew. Each
    choice among the blocks, of those to replicate and of those to give back, looks at every one alone.
    """
    early = gives_back and "refit" in options.methods
    passes, choices = 1 + (replicates or early), replicates + gives_back + early
    treated = sum(tier != "insensitive" for tier in tiers.values())
    steps, end = (-(-s.steps // s.check_every) + 1 for s in (options.block_schedule, options.whole_schedule))
    trained = (
        treated * (steps if options.block_schedule.steps else 0) + end
        if treated and "distillation" in options.methods
        else 0
    )
    dropped = len(tiers) if "refit" in options.methods else treated
    without_training = [m for m in options.methods if m != "distillation"]
    per_block = len(without_training) + (len(options.refit_parts) - 1 if "refit" in options.methods else 0)
    judged = dropped.bit_length() + 1 if dropped and without_training else 0
    return passes * (dropped * per_block + judged) + trained + choices * (len(tiers) + len(tiers).bit_length())
