"""What recovery leaves behind: a transformers checkpoint with a plan in it, written whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from spd_calib.errors import InputError
from spd_calib.formats.common import ModelRef
from spd_calib.formats.files import dumps, sha256_of, unwritable
from spd_calib.formats.plan import CompensationFile, Plan
from spd_calib.models.load import Source, model_ref, read_config
from spd_calib.parallel.compensation import tensors_of

from .distillation import trainable
from .planned import PlannedModel

COMPENSATION_FILE = "compensation.safetensors"
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf")


def check_output(output: Path) -> None:
    """Fail before the work, not after it. Raises InputError where no checkpoint could be written to `output`."""
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise InputError(f"{output} is there already; name a new folder with -o, or remove it.")
    if not output.absolute().parent.is_dir() or not os.access(output.absolute().parent, os.W_OK):
        raise InputError(
            f"The folder {output.absolute().parent} does not exist or cannot be written to; choose another."
        )


def storage_dtype(config) -> torch.dtype:
    """What the checkpoint's weights are stored in."""
    dtype = getattr(config, "dtype", None) or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


@torch.no_grad()
def round_to_storage(model: PlannedModel, dtype: torch.dtype) -> None:
    """Round trained weights to what they are stored in, so that what is verified is what is written.

    Predictors are stored in float32. Weights that a student shares with the dense model are in that form already.
    """
    for student in model.students.values():
        predictors = set(map(id, student.block.compensation.parameters() if student.block.compensation else ()))
        for p in trainable(student):
            if id(p) not in predictors:
                p.copy_(p.to(dtype))


def compensation_tensors(model: PlannedModel) -> dict[str, Tensor]:
    """The predictors of all blocks, as the file beside the plan holds them; empty where there are none."""
    tensors: dict[str, Tensor] = {}
    for index, student in model.students.items():
        tensors |= tensors_of(index, dict(enumerate(student.compensation or ())))
    return tensors


def write_checkpoint(
    output: Path,
    model: PlannedModel,
    source: Source,
    make_plan: Callable[[ModelRef, CompensationFile | None], Plan],
    report: dict,
) -> Plan:
    """Weights, configuration, tokenizer, predictors, plan.json and recovery.json into the folder `output`.

    `make_plan` is given the new checkpoint's reference. Uses up `model`. Raises SpdError where the disk refuses.
    """
    with _whole_folder(output) as folder:
        predictors = compensation_tensors(model)
        restored = model.restored()
        nn.Module.to(restored, storage_dtype(restored.config))
        restored.save_pretrained(folder)
        for path in source.folder.iterdir():  # configuration and tokenizer as they were
            if path.is_file() and not path.name.endswith(WEIGHTS) and path.name not in ("plan.json", "recovery.json"):
                shutil.copyfile(path, folder / path.name)
        beside = None
        if predictors:
            save_file(predictors, folder / COMPENSATION_FILE)
            beside = CompensationFile(file=COMPENSATION_FILE, sha256=sha256_of(folder / COMPENSATION_FILE))
        written = Source(str(output), folder, None)
        plan = make_plan(model_ref(written, read_config(written)), beside)
        (folder / "plan.json").write_text(dumps(plan), encoding="utf-8")
        (folder / "recovery.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        for path in folder.iterdir():  # safetensors keeps what it writes to its owner
            path.chmod((folder / "plan.json").stat().st_mode)
    return plan


@contextmanager
def _whole_folder(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its name at the end, or goes."""
    check_output(output)
    temporary: Path | None = None
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.absolute().parent))
        yield temporary
        os.chmod(temporary, 0o755)
        os.replace(temporary, output)
    except (OSError, SafetensorError) as e:
        raise unwritable(output, e) from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
