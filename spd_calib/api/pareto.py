"""The cheapest set of sync points of every size, from a profile alone."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from spd_calib.formats.pareto import Pareto
from spd_calib.formats.phases import Phase
from spd_calib.formats.profile import Profile
from spd_calib.planning.latency import LatencyModel
from spd_calib.planning.pareto import pareto_of

from .latency import LatencyOptions, latency_models
from .opening import Model, document_of
from .options import RunOptions
from .progress import SILENT, Progress
from .provenance import provenance
from .recovered import open_profiled


def pareto(
    profile: Profile | Path | str,
    *,
    strategies: Sequence[str] | None = None,
    latency: LatencyOptions | None = None,
    model: Model | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    run: RunOptions = RunOptions(),
    progress: Progress = SILENT,
) -> Pareto:
    """Return the cheapest set of every size that a profile knows of; the model is opened for its `latency` alone.

    The arguments are those of `plan`. Raises InputError for what cannot be used.
    """
    measured, path = document_of(Profile, profile)
    models: Mapping[Phase, LatencyModel] = {}
    if latency:
        session, recovered = open_profiled(measured, path=path, model=model, tokenizer=tokenizer)
        before = recovered.plan if recovered else None
        models = latency_models(session, latency, recovered=before, progress=progress)
    resolved = replace(run.resolved(measured.provenance.dtype), seed=measured.provenance.seed)
    return pareto_of(measured, provenance=provenance(resolved), strategies=strategies, latency=models)
