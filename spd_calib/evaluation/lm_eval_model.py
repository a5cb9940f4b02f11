"""lm-eval's own command line with a model more: `spd_calib`, a planned model that all of lm-eval's tasks can be run on.

Importing this module registers the model: --model spd_calib --model_args plan=plan.json[,pretrained=MODEL].
"""

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from spd_calib.errors import InputError, SpdError
from spd_calib.formats.files import read, sha256_of
from spd_calib.formats.plan import Plan
from spd_calib.models.load import DTYPES
from spd_calib.models.plan_files import load_plan
from spd_calib.parallel.session import open_session, versions

from .options import MODEL_ARGUMENTS
from .quiet import first_line, quiet


def as_named(model: str, plan: Path) -> str:
    """Return the name itself: a folder or hub id."""
    return model


@register_model("spd_calib")
class PlannedLM(HFLM):
    """lm-eval's `hf` on the model of a plan, its sync points dropped as the plan says, on simulated ranks."""

    # from a model as the plan names it, and the plan's file, to a folder or hub id
    resolve_model: Callable[[str, Path], str] = staticmethod(as_named)
    responses: str  # names, in a cache of responses, everything they depend on

    def __init__(
        self,
        plan: str,
        pretrained: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = 64,
        trust_remote_code: bool = False,  # lm-eval's flag for data sets; a model's own code is never run
        **kwargs: Any,
    ):
        """Load the plan's model; `pretrained` and `dtype` are the plan's unless given.

        A CUDA device that is not there becomes the CPU, as in `hf`.

        Raises InputError where the plan cannot be read or is not for this model, and for an argument not known.
        """
        if unknown := sorted(set(kwargs) - set(MODEL_ARGUMENTS)):
            known = ", ".join(("plan", "pretrained", "dtype", "device", *MODEL_ARGUMENTS))
            raise InputError(f"The lm-eval model spd_calib takes no argument {unknown[0]!r}; it takes {known}.")
        self.plan, drops = load_plan(Path(plan))
        dtype = self.plan.provenance.dtype if dtype in (None, "auto") else dtype
        if dtype not in DTYPES:
            raise InputError(f"The model argument dtype={dtype} is none of {', '.join(DTYPES)}.")
        name = type(self).resolve_model(pretrained or self.plan.model.id, Path(plan))
        session = open_session(name, self.plan.tensor_parallel.size, expected=self.plan.model)
        lm = session.load(_device(device), dtype, seed=self.plan.provenance.seed, drops=drops)
        self.running = lm.running(drops)
        self.running.__enter__()  # to the end of the process: lm-eval calls the model whenever it wants
        answered_by = [sha256_of(Path(plan)), self.plan.model.weight_fingerprint, dtype, kwargs, versions()]
        self.responses = hashlib.sha256(json.dumps(answered_by, sort_keys=True, default=str).encode()).hexdigest()
        with quiet():  # it warns of arguments ignored; those are refused above
            super().__init__(
                pretrained=lm.model,
                tokenizer=session.tokenizer,
                batch_size=batch_size,
                max_batch_size=max_batch_size,
                **kwargs,
            )

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Give this plan's responses a table of their own in lm-eval's cache (`use_cache`), which knows requests alone.

        Without it the second plan would get the scores of the first. The same database object serves look-ups.
        """
        from sqlitedict import SqliteDict

        database = cache_hook.dbdict
        if database is not None and database.tablename != self.responses:
            SqliteDict(database.filename, tablename=self.responses, autocommit=True).close()  # makes the table
            database.tablename = self.responses
        super().set_cache_hook(cache_hook)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None) -> "PlannedLM":
        """Make the model as lm-eval does; where an argument is given twice, the one among the model's arguments counts.

        The plan's model is added to `arg_dict` as `pretrained`, where none is given: that is where lm-eval looks for
        the name of the folder that results go to.
        """
        if "plan" not in arg_dict:
            raise InputError("The lm-eval model spd_calib needs a plan among its arguments: plan=plan.json.")
        given = {key: value for key, value in (additional_config or {}).items() if value is not None}
        arg_dict.setdefault("pretrained", read(Plan, Path(arg_dict["plan"])).model.id)
        return cls(**{**given, **arg_dict})

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> "PlannedLM":
        from lm_eval.utils import simple_parse_args_string

        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    def get_model_info(self) -> dict:
        """Return what stands in lm-eval's results of the model; nothing is asked of the hub."""
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": str(self.model.dtype),
            "model_revision": self.plan.model.revision or "",
            "model_sha": self.plan.model.revision or "",
            "spd_calib": self.plan.model_dump(mode="json", include={"model", "tensor_parallel", "requires", "blocks"}),
        }


def run_command_line(argv: Sequence[str], resolve_model: Callable[[str, Path], str] = as_named) -> int:
    """Run lm-eval's command line on `argv`, as typed after `lm-eval`, and return its exit code.

    `resolve_model` is told the model of a plan, or the model argument `pretrained`, and the plan's file, and says
    where the model lies. Raises InputError with the reason where lm-eval fails.
    """
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    PlannedLM.resolve_model = staticmethod(resolve_model)
    before, sys.argv = sys.argv, ["lm-eval", *argv]
    try:
        setup_logging()
        command_line = HarnessCLI()
        command_line.execute(command_line.parse_args())
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else int(e.code is not None)
    except SpdError:
        raise
    except Exception as e:
        raise InputError(f"lm-eval stops: {first_line(e)}.") from e
    finally:
        sys.argv = before
    return 0


def _device(device: str | None) -> str:
    wanted = device or "cuda"
    return wanted if torch.cuda.is_available() or not wanted.startswith("cuda") else "cpu"
