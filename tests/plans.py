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
    mlp_kinds: Sequence[str | None] = (),
    replicated: Mapping[int, Sequence[Sequence[int]]] | None = None,
    prefill: Mapping[int, Mapping[str, object]] | None = None,
    **changes,
) -> Path:
    """A plan for the model in `folder` with these strategies, and beside it random predictors of these kinds.

    `kinds`: one a block, or None where its MLP reads the rank's own partial sum; "scaled mean" has a scale, too.
    `mlp_kinds`: the same of the predictors behind its MLP, `routers` of what routers read, or "zero". `bits`: of
    quantised syncs, by block and "attention" or "mlp". `replicated`: KV groups, by block and rank. `prefill`: what it
    does otherwise, by block. `changes` replace whole fields. Returns `path`.
    """
    from spd_calib.formats.common import Provenance, TensorParallel, TextRef
    from spd_calib.formats.files import dumps
    from spd_calib.formats.plan import (
        Budget,
        Compensation,
        Plan,
        PlannedBlock,
        Predicted,
        Prefill,
        RouterPredictor,
        Verified,
    )
    from spd_calib.models.load import locate, model_ref, read_config

    source = locate(str(folder))
    mlp = mlp or ["keep_sync"] * len(attention)
    text = TextRef(source="t", seq_len=8, min_len=8, pack=False, first=0, sequences=1, tokens=8, sha256="0" * 64)

    def forms_of(kinds):
        named = [k and (k.removeprefix("scaled "), k.startswith("scaled ")) for k in kinds] or [None] * len(attention)
        return [n and Compensation(kind=n[0], rank=RANK if n[0] == "low_rank" else 0, scaled=n[1]) for n in named]

    reads = [k and RouterPredictor(kind=k, rank=RANK if k == "low_rank" else 0) for k in routers]
    reads = reads or [None] * len(attention)
    beside = None
    if any((*kinds, *mlp_kinds, *routers)):
        beside = _write_predictors(path, locate(str(folder)).folder, tp, kinds, routers, mlp_kinds)
    otherwise = [value for of_block in (prefill or {}).values() for value in of_block.items()]
    deferred = "block_drop" in mlp or ("mlp_strategy", "block_drop") in otherwise
    bits_sent = bool(bits) or any(name.endswith("bits") for name, _ in otherwise)
    requires = ["mlp_drop"] * deferred + ["compensation"] * any((*kinds, *mlp_kinds))
    requires += ["quantised_sync"] * bits_sent + ["replicated_heads"] * bool(replicated)
    requires += ["router_predictor"] * any(map(bool, routers)) + ["two_phases"] * bool(prefill)
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
                replicated=(replicated or {}).get(i),
                prefill=Prefill(**prefill[i]) if i in (prefill or {}) else None,
                compensation=form,
                router=router,
                mlp_compensation=mlp_form,
                reason="a test",
            )
            for i, (a, m, form, router, mlp_form) in enumerate(
                zip(attention, mlp, forms_of(kinds), reads, forms_of(mlp_kinds), strict=True)
            )
        ],
        budget=Budget(kind="drop", value=1, strategies=["block_drop"]),
        predicted=Predicted(kl=0.0, ppl_increase=0.0, accuracy_drop=0.0),
        verified=Verified(**zeros, ppl=1.0, tokens=8, sequences=1, text=text),
        provenance=Provenance(command="a test", seed=0, device="cpu", dtype="float32", versions={}),
    )
    path.write_text(dumps(plan.model_copy(update=changes)))
    return path


def _write_predictors(path: Path, folder: Path, tp: int, kinds, routers, mlp_kinds):
    """Large enough to be noticed; returns what the plan says of the file."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig

    from spd_calib.formats.files import sha256_of
    from spd_calib.formats.plan import CompensationFile

    config = AutoConfig.from_pretrained(folder).get_text_config()
    d, heads = config.hidden_size, config.num_attention_heads

    def d_rank(block: int) -> int:
        if (getattr(config, "layer_types", None) or {block: ""})[block] == "linear_attention":
            return config.linear_num_value_heads * config.linear_value_head_dim // tp
        own = config.per_layer_config[block] if config.model_type == "gemma4_text" else config
        return heads * (getattr(own, "head_dim", None) or d // heads) // tp

    def shapes(kind: str, width: int) -> dict[str, tuple[int, ...]]:
        of = {
            "mean": {"bias": (d,)},
            "low_rank": {"bias": (d,), "a": (width, RANK), "b": (RANK, d)},
            "full": {"bias": (d,), "w": (width, d)},
        }.get(kind.removeprefix("scaled "), {})
        return {**of, "scale": (d,)} if kind.startswith("scaled ") else of

    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"blocks.{block}.{point}ranks.{rank}.{part}": 0.3 * torch.randn(shape, generator=generator)
        for point, read, of_point in (("", d_rank, kinds), ("mlp.", lambda _: d, mlp_kinds))
        for block, kind in enumerate(of_point)
        for rank in range(tp)
        for part, shape in shapes(kind or "", read(block)).items()
    }
    tensors |= {
        f"blocks.{block}.router.{part}": 0.3 * torch.randn(shape, generator=generator)
        for block, kind in enumerate(routers)
        for part, shape in shapes(kind or "", d).items()
    }
    file = path.with_name("compensation.safetensors")
    save_file(tensors, file)
    return CompensationFile(file=file.name, sha256=sha256_of(file))
