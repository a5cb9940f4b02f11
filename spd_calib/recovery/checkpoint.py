"""Writing a recovered checkpoint, transformers' files with a plan among them: whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import GenerationConfig

from spd_calib.errors import InputError
from spd_calib.formats.common import ModelRef
from spd_calib.formats.files import dumps, sha256_of, unwritable
from spd_calib.formats.plan import CompensationFile, Plan
from spd_calib.formats.recovery import REPORT_FILE, Recovery
from spd_calib.models.checkpoint import NUMBERS, ROTARY
from spd_calib.models.load import DTYPES, Source, model_ref, read_config
from spd_calib.models.plan_files import predictor_tensors
from spd_calib.models.schemes import scheme_of, without_quantisation
from spd_calib.models.stored import stored_tensors
from spd_calib.models.text_part import whole_of

from .planned_model import PlannedModel
from .stored_form import is_part, write_as_stored

COMPENSATION_FILE = "compensation.safetensors"
WEIGHTS = (
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf", ".h5", ".msgpack"
)  # fmt: skip


class MakePlan(Protocol):
    """Makes the plan of a checkpoint: given its reference, and the file of its predictors if it has any."""

    def __call__(self, *, checkpoint: ModelRef, predictors: CompensationFile | None) -> Plan: ...


def check_output(output: Path) -> None:
    """Raise InputError, before the work rather than after it, where no checkpoint could be written to `output`."""
    if output.is_mount():
        raise InputError(f"{output} is a mount point, whose place no folder can take; name a new folder in it.")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise InputError(f"{output} is there already; name a new folder, or remove it.")
    if not output.absolute().parent.is_dir() or not os.access(output.absolute().parent, os.W_OK):
        raise InputError(
            f"The folder {output.absolute().parent} does not exist or cannot be written to; choose another."
        )


def storage_dtype(source: Source) -> torch.dtype:
    """Return the dtype that holds all of a model's stored weights exactly: bfloat16, float16 or float32.

    Of a quantised model, whose weights are dequantised, the one that its configuration names, float32 if none of them.
    """
    config = read_config(source)
    if scheme_of(config) is not None:
        named = str(getattr(config, "dtype", None) or getattr(whole_of(config), "dtype", None))
        return DTYPES.get(named.removeprefix("torch."), torch.float32)
    found = {t.dtype for name, t in stored_tensors(source.folder).items() if not ROTARY.search(name)} & set(NUMBERS)
    narrow = {"BF16": torch.bfloat16, "F16": torch.float16}
    return narrow.get(found.pop(), torch.float32) if len(found) == 1 else torch.float32


def write_checkpoint(
    output: Path,
    model: PlannedModel,
    *,
    source: Source,
    make_plan: MakePlan,
    report: Recovery,
) -> Plan:
    """Write weights, configuration, tokenizer, predictors, plan.json and recovery.json into the folder `output`.

    `source` is the dense model's folder, `report` what recovery.json holds. Uses up `model`. Returns the plan.
    Raises SpdError where the disk refuses.
    """
    with _whole_folder(output) as folder:
        predictors, dtype = predictor_tensors(model.drops), storage_dtype(source)
        if model.lm.streamed or is_part(model.lm.model.config):
            write_as_stored(folder, model, source=source, dtype=dtype)
        else:
            restored = model.restored()
            nn.Module.to(restored, dtype)
            restored.generation_config = GenerationConfig()  # transformers writes no settings that do not fit together
            restored.save_pretrained(folder)
            (folder / "generation_config.json").unlink(missing_ok=True)
        for path in source.folder.iterdir():  # configuration and tokenizer as they were
            if path.is_file() and not path.name.endswith(WEIGHTS) and path.name not in ("plan.json", REPORT_FILE):
                shutil.copyfile(path, folder / path.name)
        _forget_quantisation(folder / "config.json")
        beside = None
        if predictors:
            save_file(predictors, folder / COMPENSATION_FILE)
            beside = CompensationFile(file=COMPENSATION_FILE, sha256=sha256_of(folder / COMPENSATION_FILE))
        written = Source(str(output), folder, None)
        plan = make_plan(checkpoint=model_ref(written, read_config(written)), predictors=beside)
        (folder / "plan.json").write_text(dumps(plan), encoding="utf-8")
        (folder / REPORT_FILE).write_text(dumps(report), encoding="utf-8")
        for path in folder.iterdir():  # safetensors keeps what it writes to its owner
            path.chmod((folder / "plan.json").stat().st_mode)
    return plan


def _forget_quantisation(config: Path) -> None:
    """Take the quantisation out of a config.json that came from a quantised model: what is written is dequantised."""
    said = json.loads(config.read_text(encoding="utf-8"))
    kept = without_quantisation(said)
    if kept != said:
        config.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _whole_folder(output: Path) -> Iterator[Path]:
    """Yield a folder beside `output` that takes its name at the end, or is removed."""
    check_output(output)
    temporary = output.absolute().parent / f".{output.name}.part"  # the same each time: what was killed left it
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(mode=0o700)
        yield temporary
        os.chmod(temporary, 0o755)
        os.replace(temporary, output)
    except (OSError, SafetensorError) as e:
        raise unwritable(output, e) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
