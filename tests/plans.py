"""Plans for the tests, written by hand: strategies as wanted, measurements made up."""

from collections.abc import Sequence
from pathlib import Path


def write_plan(
    path: Path, folder: Path, tp: int, attention: Sequence[str], mlp: Sequence[str] | None = None, **changes
) -> Path:
    """A plan for the model in `folder` with these strategies; `changes` replace whole fields. Returns `path`."""
    from spd_calib.formats.common import Provenance, TensorParallel, TextRef
    from spd_calib.formats.files import dumps
    from spd_calib.formats.plan import Budget, Plan, PlannedBlock, Predicted, Verified
    from spd_calib.models.load import locate, model_ref, read_config

    source = locate(str(folder))
    mlp = mlp or ["keep_sync"] * len(attention)
    text = TextRef(source="t", seq_len=8, min_len=8, pack=False, first=0, sequences=1, tokens=8, sha256="0" * 64)
    zeros = dict.fromkeys(set(Verified.model_fields) - {"text", "ppl", "tokens", "sequences"}, 0.0)
    plan = Plan(
        model=model_ref(source, read_config(source)),
        tensor_parallel=TensorParallel(size=tp),
        requires=["mlp_drop"] if "block_drop" in mlp else [],
        blocks=[
            PlannedBlock(index=i, module=f"model.layers.{i}", strategy=a, mlp_strategy=m, reason="a test")
            for i, (a, m) in enumerate(zip(attention, mlp, strict=True))
        ],
        budget=Budget(kind="drop", value=1, strategies=["block_drop"]),
        predicted=Predicted(kl=0.0, ppl_increase=0.0, accuracy_drop=0.0),
        verified=Verified(**zeros, ppl=1.0, tokens=8, sequences=1, text=text),
        provenance=Provenance(command="a test", seed=0, device="cpu", dtype="float32", versions={}),
    )
    path.write_text(dumps(plan.model_copy(update=changes)))
    return path
