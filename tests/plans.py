"""Plans for the tests, written by hand: strategies as wanted, measurements made up."""

from collections.abc import Mapping, Sequence
from pathlib import Path

RANK = 3  # of low-rank predictors


def write_plan(
    path: Path,
    folder: Path,
    tp: int,
    attention: Sequence[str],
    mlp: Sequence[str] | None = None,
    kinds: Sequence[str | None] = (),
    bits: Mapping[tuple[int, str], int] | None = None,
    routers: Sequence[str | None] = (),
    **changes,
) -> Path:
    """A plan for the model in `folder` with these strategies, and beside it random predictors of these kinds.

    `kinds`: one a block, or None where its MLP reads the rank's own partial sum. `bits`: of quantised syncs, by block
    and "attention" or "mlp". `routers`: the same as `kinds` for what routers read, or "zero". `changes` replace whole
    fields. Returns `path`.
    """
    from spd_calib.formats.common import Provenance, TensorParallel, TextRef
    from spd_calib.formats.files import dumps
    from spd_calib.formats.plan import Budget, Compensation, Plan, PlannedBlock, Predicted, RouterPredictor, Verified
    from spd_calib.models.load import locate, model_ref, read_config

    source = locate(str(folder))
    mlp = mlp or ["keep_sync"] * len(attention)
    text = TextRef(source="t", seq_len=8, min_len=8, pack=False, first=0, sequences=1, tokens=8, sha256="0" * 64)
    forms = [k and Compensation(kind=k, rank=RANK if k == "low_rank" else 0) for k in kinds] or [None] * len(attention)
    reads = [k and RouterPredictor(kind=k, rank=RANK if k == "low_rank" else 0) for k in routers] or [None] * len(forms)
    beside = (
        _write_predictors(path, locate(str(folder)).folder, tp, kinds, routers) if any((*kinds, *routers)) else None
    )
    requires = ["mlp_drop"] * ("block_drop" in mlp) + ["compensation"] * any(map(bool, kinds))
    requires += ["quantised_sync"] * bool(bits)
    requires += ["router_predictor"] * any(map(bool, routers))
    required = {name for name, field in Verified.model_fields.items() if field.is_required()}
    zeros = dict.fromkeys(required - {"text", "ppl", "tokens", "sequences"}, 0.0)
    plan = Plan(
        model=model_ref(source, read_config(source)),
        tensor_parallel=TensorParallel(size=tp),
        requires=requires,
        compensation=beside,
        blocks=[
            PlannedBlock(
                index=i,
                module=f"model.layers.{i}",
                strategy=a,
                mlp_strategy=m,
                sync_bits=(bits or {}).get((i, "attention")),
                mlp_sync_bits=(bits or {}).get((i, "mlp")),
                compensation=form,
                router=router,
                reason="a test",
            )
            for i, (a, m, form, router) in enumerate(zip(attention, mlp, forms, reads, strict=True))
        ],
        budget=Budget(kind="drop", value=1, strategies=["block_drop"]),
        predicted=Predicted(kl=0.0, ppl_increase=0.0, accuracy_drop=0.0),
        verified=Verified(**zeros, ppl=1.0, tokens=8, sequences=1, text=text),
        provenance=Provenance(command="a test", seed=0, device="cpu", dtype="float32", versions={}),
    )
    path.write_text(dumps(plan.model_copy(update=changes)))
    return path


def _write_predictors(path: Path, folder: Path, tp: int, kinds: Sequence[str | None], routers: Sequence[str | None]):
    """Large enough to be noticed; returns what the plan says of the file."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig

    from spd_calib.formats.files import sha256_of
    from spd_calib.formats.plan import CompensationFile

    config = AutoConfig.from_pretrained(folder)
    d, heads = config.hidden_size, config.num_attention_heads
    d_rank = heads * (getattr(config, "head_dim", None) or d // heads) // tp

    def shapes(kind: str, width: int) -> dict[str, tuple[int, ...]]:
        return {
            "mean": {"bias": (d,)},
            "low_rank": {"bias": (d,), "a": (width, RANK), "b": (RANK, d)},
            "full": {"bias": (d,), "w": (width, d)},
        }.get(kind, {})

    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"blocks.{block}.ranks.{rank}.{part}": 0.3 * torch.randn(shape, generator=generator)
        for block, kind in enumerate(kinds)
        for rank in range(tp)
        for part, shape in shapes(kind or "", d_rank).items()
    }
    tensors |= {
        f"blocks.{block}.router.{part}": 0.3 * torch.randn(shape, generator=generator)
        for block, kind in enumerate(routers)
        for part, shape in shapes(kind or "", d).items()
    }
    file = path.with_name("compensation.safetensors")
    save_file(tensors, file)
    return CompensationFile(file=file.name, sha256=sha256_of(file))
