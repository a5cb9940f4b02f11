"""Checking a plan before an engine loads a model: that it can do all the plan asks for, and whose the plan is."""

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from spd_calib.errors import InputError
from spd_calib.formats.plan import Plan

from .hashed_once import hashed_once

ENVIRONMENT = "SPD_PLAN"
"""The variable of the environment that names a plan where an engine's own configuration does not."""


def named_in_environment() -> str | None:
    """Return the plan that the environment names; None where it names none."""
    return os.environ.get(ENVIRONMENT) or None


def check_requires(
    plan: Plan, path: Path, *, engine: str, supported: Collection[str], lacking: Mapping[str, str] | None = None
) -> None:
    """Raise InputError where the plan requires what an engine's runtime does not have; `lacking`: why it has not."""
    if unknown := sorted(set(plan.requires) - set(supported)):
        why = (lacking or {}).get(unknown[0], "")
        raise InputError(
            f"{path} requires {unknown[0]!r}, which the {engine} runtime does not have{why and ': '}{why}."
        )


def check_tp(plan: Plan, path: Path, *, engine: str, tp: int, flag: str) -> None:
    """Raise InputError where an engine was started with another number of ranks, by its `flag`, than the plan's."""
    if tp != plan.tensor_parallel.size:
        raise InputError(
            f"{path} is for TP {plan.tensor_parallel.size}, but {engine} was started with TP {tp}; set {flag} "
            f"{plan.tensor_parallel.size} or plan anew."
        )


def check_same_model(
    plan: Plan, path: Path, *, architecture: str, blocks: int, model: str, revision: str | None
) -> Any:
    """Compare the plan's model with `model`, an id or a folder: architecture, number of blocks, every weight on disk.

    Returns the model's configuration. Not config_hash is compared: it is of the configuration as one version of
    transformers fills it in, and an engine may bring another. Raises InputError where they differ.
    """
    from spd_calib.models.load import checked_fingerprint, locate, read_config

    if (plan.model.architecture, plan.model.num_blocks) != (architecture, blocks):
        raise InputError(
            f"{path} is for {plan.model.architecture} with {plan.model.num_blocks} blocks, but {model} is "
            f"{architecture} with {blocks}; name the right model, or plan anew."
        )
    source = locate(model, revision)
    config = read_config(source)
    if hashed_once(source.folder, lambda: checked_fingerprint(source, config)) != plan.model.weight_fingerprint:
        raise InputError(
            f"{path} was made for other weights than those of {model}; name the right model, or plan anew."
        )
    return config
