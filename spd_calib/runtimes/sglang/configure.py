"""From SGLang's arguments and a plan to the plan that every rank applies, or one sentence why it cannot be run.

SGLang has no field of its own for a plan, so the environment names it (SPD_PLAN), on every node.
"""

from pathlib import Path
from typing import Any

from spd_calib.errors import InputError
from spd_calib.formats.files import read
from spd_calib.formats.plan import Plan
from spd_calib.models.plan_files import load_drops
from spd_calib.runtimes.plan_checks import check_requires, check_same_model, check_tp, named_in_environment

from .forms import FORMS
from .refusals import not_as_measured

SUPPORTED = {"mlp_drop", "compensation"}
"""The requirements of a plan that this runtime meets."""

LACKING = {"two_phases": "one forward of SGLang may hold chunks of prompts and single tokens of other sequences"}
"""A requirement that it does not meet, and why."""

VERSION = "0.5.23"
"""The release of SGLang whose source this was written against."""


def configured(args: Any) -> None:
    """Check the plan that the environment names against SGLang's `args`, before a process is started for it."""
    if (path := plan_path()) is None:
        return
    plan = read(Plan, path)
    check(plan, path, args=args)
    load_drops(plan, path, ranks=())  # no predictor yet, but their file must be there, whole, and the plan's


def plan_path() -> Path | None:
    """Return where the plan lies that the environment names; None where it names none any more."""
    named = named_in_environment()
    return None if named is None else Path(named).expanduser().resolve()


def check(plan: Plan, path: Path, *, args: Any) -> Any:
    """Check all that can be known before the model is loaded; returns its configuration, as it lies on disk.

    Raises InputError with the reason.
    """
    import sglang
    import torch
    from sglang.srt.arg_groups.overrides import model_config_of, resolution_result

    def value(name: str) -> Any:
        return resolution_result(args, name)

    if sglang.__version__ != VERSION:
        raise InputError(
            f"{path} can be run by SGLang {VERSION}, whose layers spd-calib knows, and this is {sglang.__version__}; "
            f"install that one, or serve without the plan."
        )
    if torch.version.hip:
        raise InputError(f"{path} cannot be run on ROCm, whose layers in SGLang spd-calib does not know.")
    check_requires(plan, path, engine="SGLang", supported=SUPPORTED, lacking=LACKING)
    check_tp(plan, path, engine="SGLang", tp=value("tp_size"), flag="--tp-size")
    model = model_config_of(args)
    architecture = (model.hf_config.architectures or [""])[0]
    if architecture not in FORMS:
        raise InputError(
            f"SGLang would run {architecture}, whose decoder layer spd-calib does not know there: {path} can be run on "
            f"{', '.join(FORMS)}."
        )
    if what := not_as_measured(value, dtype=str(model.dtype).removeprefix("torch.")):
        raise InputError(f"{path} cannot be run with {what}: the SGLang runtime of spd-calib does not support it.")
    return check_same_model(
        plan,
        path,
        architecture=architecture,
        blocks=model.hf_config.num_hidden_layers,
        model=value("model_path"),
        revision=value("revision"),
    )
