"""From a profile and a budget to a verified plan."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from spd_calib.formats.files import dumps, write_bytes, write_text
from spd_calib.formats.pareto import Pareto
from spd_calib.formats.plan import Plan
from spd_calib.formats.profile import Comparison, Profile
from spd_calib.planning.budget_options import Amount, BudgetOptions
from spd_calib.planning.pareto import pareto_of
from spd_calib.planning.plan import make_plan
from spd_calib.planning.replication import Replicated
from spd_calib.planning.sync_bits import ANY_BITS, every_sync
from spd_calib.planning.whole_plans import Calibration, HeldOut, measure_plans, part_of
from spd_calib.sensitivity.measure import Subject

from .latency import LatencyOptions
from .norm_estimates import give_estimates, with_estimates
from .opening import Model
from .options import RunOptions
from .plan_by_phase import check_can_be_served, check_request, plan_by_phase
from .plan_inputs import PlanInputs, open_inputs
from .progress import SILENT, Progress
from .provenance import provenance
from .replication import attentions, replicated_heads
from .sync_bits import checked_bits
from .tasks import TaskOptions
from .text import verification_rounds


@dataclass(frozen=True)
class PlanningResult:
    """A plan, and what was found on the way to it.

    given_back: how many sync points held-out text showed to be too many, after they had been chosen.
    compared: what the plan and the baseline sets of its size cost on the calibration text, by name; empty unless asked
    for. pareto: the cheapest set of every size, with what was measured of them. predictors: the content of the file
    that the plan names, for a recovered checkpoint, or a model whose branches go through a norm.
    """

    plan: Plan
    given_back: int
    compared: Mapping[str, Comparison]
    pareto: Pareto
    predictors: bytes | None = field(default=None, repr=False)

    def write(self, path: Path) -> None:
        """Write the plan to `path`, and the predictors that it names beside it. Raises as files.write_bytes does."""
        if self.predictors is not None and self.plan.compensation is not None:
            write_bytes(path.parent / self.plan.compensation.file, self.predictors)
        write_text(path, dumps(self.plan))


def plan(
    profile: Profile | Path | str,
    *,
    max_kl: Amount | None = None,
    max_ppl_increase: Amount | None = None,
    max_accuracy_drop: Amount | None = None,
    max_logprob_diff: Amount | None = None,
    min_speedup: Amount | None = None,
    max_bytes: Amount | None = None,
    drop: int | str | None = None,
    tau1: float | None = None,
    tau2: float | None = None,
    each_text: bool = False,
    strategies: Sequence[str] | None = None,
    tasks: TaskOptions | None = None,
    latency: LatencyOptions | None = None,
    compare: bool = False,
    sync_bits: int | str | None = None,
    replicate: Amount | None = None,
    model: Model | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    run: RunOptions = RunOptions(),
    progress: Progress = SILENT,
) -> Plan:
    """Return a plan of the sync points to drop within exactly one budget, verified as a whole on held-out text.

    Args:
        profile: the document, or the path of its file.
        max_kl: KL(dense || planned), nats per token: 0.05.
        max_ppl_increase: relative: 0.01, or '1%'.
        max_accuracy_drop: a fraction of next tokens or, with `tasks`, of lm-eval documents: 0.01 is one point.
        max_logprob_diff: the largest |delta log p| of any token, anywhere.
        min_speedup: share of a step's time to save by the model of `latency`, or of a whole request's: '10%'.
        max_bytes: share of all syncs' bytes at 16 bits a value that may be sent, '25%': at the least KL sync points
            are kept, sent with 8, 6 or 4 bits, or dropped.
        drop: a number of sync points, or a share of those profiled: 5, '60%'.
        tau1, tau2: the paper's thresholds, points of perplexity: drop up to tau1, extremely sensitive above tau2.
        each_text: keep the budget on each of the profile's texts, not on their mean.
        strategies: 'block_drop', 'plain_drop' (default: those profiled).
        tasks: lm-eval tasks; every second document chooses, the others verify.
        latency: the machine to model latency on. With its `new_tokens` the plan is for whole requests, may have a
            choice for prefill and one for decoding, and is measured as it is served (planning/two_phases.py).
        compare: measure baseline sets of the same size, too; the best of all is taken (see plan_with_details).
        sync_bits: 8, 6 or 4: every sync that is kept is a quantised one, in all that is measured (default: none is).
            'any', with min_speedup: each is kept as it is, with 8, 6 or 4 bits, or dropped, at the least KL.
        replicate: share of the weights a rank reads that it may read more, '7%': heads of other ranks that it computes,
            too, for what its MLP reads; in the blocks where that wins most, whose syncs are dropped in any case.
        model: where the model is, or the model itself (default: where the profile says). A quantised copy of it may
            stand in its place: the plan is then chosen, verified and to be run on the copy.
        tokenizer: of a model in memory.
        run: device, dtype (default: the profile's) and batch size; the seed is the profile's.
        progress: callbacks, told how far it is.

    Raises InputError for what cannot be used, SpdError where the budget cannot be met.
    """
    asked = BudgetOptions(
        max_kl=max_kl,
        max_ppl_increase=max_ppl_increase,
        max_accuracy_drop=max_accuracy_drop,
        max_logprob_diff=max_logprob_diff,
        min_speedup=min_speedup,
        max_bytes=max_bytes,
        drop=drop,
        tau1=tau1,
        tau2=tau2,
        each_text=each_text,
        strategies=strategies,
    )
    return plan_with_details(
        profile,
        asked,
        tasks=tasks,
        latency=latency,
        compare=compare,
        sync_bits=sync_bits,
        replicate=replicate,
        model=model,
        tokenizer=tokenizer,
        run=run,
        progress=progress,
    ).plan


def plan_with_details(
    profile: Profile | Path | str,
    asked: BudgetOptions,
    *,
    tasks: TaskOptions | None = None,
    latency: LatencyOptions | None = None,
    compare: bool = False,
    sync_bits: int | str | None = None,
    replicate: Amount | None = None,
    model: Model | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    run: RunOptions = RunOptions(),
    progress: Progress = SILENT,
) -> PlanningResult:
    """Return the plan that `plan` returns, with what was found on the way; the budget is in `asked`.

    A plan may name a file of predictors: PlanningResult.write writes both. Arguments and errors are those of `plan`.
    """
    others, new_tokens = compare or replicate is not None, latency.new_tokens if latency else None
    bits = checked_bits(sync_bits, asked, others=others, by_phase=new_tokens is not None)
    if latency is not None and new_tokens is not None:
        check_request(asked, phase=latency.phase, others=others or tasks is not None)
    inputs = open_inputs(
        profile,
        asked,
        tasks=tasks,
        latency=latency,
        bits=bits,
        any_bits=sync_bits == ANY_BITS,
        replicate=replicate,
        model=model,
        tokenizer=tokenizer,
        run=run,
        progress=progress,
    )
    subject, recovered = inputs.load(), inputs.recovered
    if new_tokens is not None:
        return _for_request(inputs, subject, new_tokens=new_tokens, sync_bits=sync_bits, progress=progress)
    quantised = every_sync(bits, subject.lm.num_blocks)
    subject = replace(subject, always=quantised | subject.always)
    give_estimates(subject, inputs.texts, batch_size=inputs.run.batch_size, progress=progress)
    calibration, held_out = _texts(inputs, subject, progress=progress)
    replicated = Replicated()
    if inputs.heads is not None:
        points = attentions(inputs.profile, inputs.reached)
        replicated = replicated_heads(points, inputs.heads, calibration=calibration, progress=progress)
        subject = replace(subject, always=subject.always | replicated.drops)
        calibration, held_out = _texts(inputs, subject, progress=progress)
    file, content = (recovered.predictors() if recovered else None) or (None, None)
    made_by = provenance(inputs.run)
    planned = make_plan(
        inputs.profile,
        inputs.reached,
        calibration=calibration,
        held_out=held_out,
        module_paths=subject.lm.module_paths,
        mixtures=subject.lm.mixtures,
        provenance=made_by,
        compare=compare,
        recovered=recovered.plan if recovered else None,
        predictors=file,
        quantised=quantised,
        replicated=replicated,
        limit=inputs.limit,
    )
    finished, estimates = with_estimates(planned.plan, subject)
    of_copy = inputs.of_copy
    drops = planned.plan.drops
    modelled = [model_of.latency(len(drops), drops.counted_bits) for model_of in inputs.models.values()]
    pareto = pareto_of(
        inputs.profile,
        provenance=made_by,
        strategies=asked.strategies,
        measured={} if replicated.drops else calibration.measured,  # which has them in every set
        latency=inputs.models,
        sync_bits=bits,
    )
    return PlanningResult(
        plan=finished.model_copy(update={"budget": inputs.budget, "latency": modelled, **of_copy}),
        given_back=planned.choice.given_back,
        compared=planned.compared,
        pareto=pareto.model_copy(update={"model": inputs.session.ref} if of_copy else {}),
        predictors=content if estimates is None else estimates,
    )


def _for_request(
    inputs: PlanInputs, subject: Subject, *, new_tokens: int, sync_bits: int | str | None, progress: Progress
) -> PlanningResult:
    """Return a plan that may have a choice for each phase of a request."""
    check_can_be_served(inputs.profile, subject)
    made = plan_by_phase(
        inputs.profile,
        inputs.budget,
        models=inputs.models,
        new_tokens=new_tokens,
        sync_bits=sync_bits,
        session=inputs.session,
        subject=subject,
        texts=inputs.texts,
        run=inputs.run,
        progress=progress,
    )
    drops = made.by_phase
    modelled = [m.latency(len(drops.at(phase)), drops.at(phase).counted_bits) for phase, m in inputs.models.items()]
    strategies = inputs.budget.strategies
    front = pareto_of(inputs.profile, provenance=made.provenance, strategies=strategies, latency=inputs.models)
    finished = made.model_copy(update={"latency": modelled, **inputs.of_copy})
    front = front.model_copy(update={"model": finished.model})
    return PlanningResult(finished, given_back=0, compared={}, pareto=front)


def _texts(inputs: PlanInputs, subject: Subject, *, progress: Progress) -> tuple[Calibration, HeldOut]:
    """Return what measures whole plans on the calibration text, and what verifies them on held-out text."""
    losses = [
        suite.losing(subject.lm, subject.dense, tokenizer=inputs.session.tokenizer) for suite in inputs.suites
    ] or [None, None]
    measure = partial(
        measure_plans,
        subject=subject,
        batch_size=inputs.run.batch_size,
        expect=progress.expect,
        tick=progress.measured,
    )
    calibration = partial(measure, texts=[text.calibration for text in inputs.texts], task_loss=losses[0])
    race = partial(measure, texts=[part_of(text.calibration) for text in inputs.texts])
    rounds = verification_rounds(inputs.session, inputs.texts)
    held_out = partial(measure, task_loss=losses[1])
    return Calibration(calibration, race=race), HeldOut(rounds, measure=held_out, same_documents=bool(inputs.suites))
