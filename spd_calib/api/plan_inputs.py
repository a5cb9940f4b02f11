"""Check and open what a plan is made from, before any weight is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from spd_calib.errors import InputError
from spd_calib.formats.common import ModelRef
from spd_calib.formats.drops import NOTHING_DROPPED
from spd_calib.formats.phases import Phase
from spd_calib.formats.plan import Budget
from spd_calib.formats.profile import Profile
from spd_calib.parallel.session import Session, is_quantised_copy
from spd_calib.planning.budget_options import Amount, BudgetOptions, budget_for
from spd_calib.planning.candidates import candidates
from spd_calib.planning.latency import LatencyModel
from spd_calib.planning.model_sizes import NOTHING_ADDED
from spd_calib.planning.replication import Affordable
from spd_calib.planning.sync_bits import Limit, limit_of_bytes, limit_of_seconds
from spd_calib.sensitivity.measure import Subject
from spd_calib.sensitivity.text import Text

from .latency import LatencyOptions, latency_models, sizes_of
from .opening import Model, document_of, resolved_for
from .options import RunOptions
from .progress import Progress
from .recovered import RecoveredCheckpoint, open_profiled
from .replication import affordable_for, any_replicated
from .tasks import TaskOptions
from .text import NOTHING_FITTED, reload_texts


@dataclass(frozen=True)
class PlanInputs:
    """All that a plan is made from, before any weight is loaded.

    `budget` is what was asked for, `reached` what is searched for: of a share of time to save, the number of drops that
    save it or, where the planner chooses bits, too, `limit`. `suites` are the tasks to choose by and those to verify
    on, if a budget is of tasks; `heads` those of other ranks that may be replicated.
    """

    profile: Profile
    budget: Budget
    reached: Budget
    session: Session
    recovered: RecoveredCheckpoint | None
    models: Mapping[Phase, LatencyModel]
    texts: list[Text]
    suites: list[Any]
    heads: Affordable | None
    limit: Limit | None
    run: RunOptions

    @property
    def of_copy(self) -> dict[str, ModelRef]:
        """Return the fields of a plan for a quantised copy of the model that was profiled; none of any other."""
        copy = is_quantised_copy(self.session, of=self.profile.model)
        return {"model": self.session.ref, "profiled": self.profile.model} if copy else {}

    def load(self) -> Subject:
        """Return the model that whole plans are measured on."""
        drops = any_replicated(self.profile, self.reached, self.heads) if self.heads else NOTHING_DROPPED
        if self.recovered:
            return self.recovered.subject(self.session, self.run, tried=drops)
        return Subject(self.session.load(self.run.device, str(self.run.dtype), seed=self.run.seed, drops=drops))


def open_inputs(
    profile: Profile | Path | str,
    asked: BudgetOptions,
    *,
    tasks: TaskOptions | None,
    latency: LatencyOptions | None,
    bits: int | None,
    any_bits: bool,
    replicate: Amount | None,
    model: Model | None,
    tokenizer: PreTrainedTokenizerBase | None,
    run: RunOptions,
    progress: Progress,
) -> PlanInputs:
    """Check what is asked for, open the model and read the profile's text again."""
    measured, path = document_of(Profile, profile)
    budget = budget_for(measured, asked)
    _check_tasks(budget, tasks)
    if budget.kind == "min_speedup" and latency is None:
        raise InputError("`min_speedup` needs `hardware`: a hardware.json, a CSV or a table's name.")
    session, recovered = open_profiled(measured, path=path, model=model, tokenizer=tokenizer)
    before = recovered.plan if recovered else None
    heads = affordable_for(measured, budget, session=session, share=replicate)
    added = heads.added if heads else NOTHING_ADDED
    models = latency_models(session, latency, recovered=before, replicated=added, progress=progress) if latency else {}
    resolved = replace(resolved_for(session, run, dtype=measured.provenance.dtype), seed=measured.provenance.seed)
    suites = [tasks.with_batch_size(resolved.batch_size).load(half=half) for half in (0, 1)] if tasks else []
    if suites:
        budget = budget.model_copy(update={"tasks": suites[0].names})
    limit, reached = None, budget
    if budget.kind == "max_bytes":
        sizes = sizes_of(session)
        limit = limit_of_bytes(budget.value, num_blocks=sizes.blocks, side_by_side=sizes.side_by_side)
    if budget.kind == "min_speedup" and latency and latency.new_tokens is None:
        if any_bits:
            limit = limit_of_seconds(budget.value, models[latency.phase])
        else:
            reached = _as_drops(measured, budget, model=models[latency.phase], bits=bits)
    return PlanInputs(
        profile=measured,
        budget=budget,
        reached=reached,
        session=session,
        recovered=recovered,
        models=models,
        texts=reload_texts(session, measured, path=path, fitted=recovered.documents if recovered else NOTHING_FITTED),
        suites=suites,
        heads=heads,
        limit=limit,
        run=resolved,
    )


def _check_tasks(budget: Budget, tasks: TaskOptions | None) -> None:
    """Raise InputError where there are tasks that the budget is not about."""
    if tasks is not None and budget.kind != "max_accuracy_drop":
        raise InputError("`tasks` belongs to `max_accuracy_drop`: leave it out, or give that budget.")
    if tasks is not None and budget.each_text:
        raise InputError("`tasks` are of no text, so there is nothing to keep on each: leave `each_text` out.")


def _as_drops(profile: Profile, budget: Budget, *, model: LatencyModel, bits: int | None) -> Budget:
    """Return, for a share of time to save, the budget of the number of drops that saves it; others have `bits`."""
    settled = len(profile.settled)
    needed = model.drops_for(budget.value, available=settled + len(candidates(profile, budget)), bits=bits)
    return budget.model_copy(update={"kind": "drop", "value": float(max(settled, needed))})
