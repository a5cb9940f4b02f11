"""spd-calib profile: what dropping each sync point costs."""

from pathlib import Path
from typing import Annotated

import typer

from .options import BatchSize, Device, Json, Recipe


def register(app: typer.Typer) -> None:
    app.command(
        "profile", epilog="Example: spd-calib profile meta-llama/Llama-2-7b-hf --tp 8 --data wikitext --pack -o p.json"
    )(profile)


def profile(
    model: Annotated[str, typer.Argument(help="Hub id, local folder, or 'demo'.")],
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel size: the number of ranks.")],
    data: Annotated[
        str, typer.Option(help="'demo', a .jsonl (key text), .txt or .parquet, or a hub dataset NAME[:CONFIG[:SPLIT]].")
    ],
    output: Annotated[Path, typer.Option("--output", "-o")] = Path("profile.json"),
    seq_len: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a document used [default: 2048, or the model's limit].")
    ] = None,
    min_len: Annotated[
        int | None, typer.Option(min=2, help="Leave out shorter documents [default: --seq-len].")
    ] = None,
    max_samples: Annotated[int, typer.Option(min=1, help="Sequences measured on.")] = 128,
    verify_samples: Annotated[int, typer.Option(min=1, help="Sequences after those, kept for verifying plans.")] = 64,
    pack: Annotated[bool, typer.Option("--pack", help="Glue documents together and cut them at --seq-len.")] = False,
    strategy: Annotated[
        list[str] | None, typer.Option(help="block_drop or plain_drop; repeatable [default: both].")
    ] = None,
    method: Annotated[str, typer.Option(help="single: one at a time; cumulative: the paper's.")] = "single",
    rank_by: Annotated[str, typer.Option(help="accuracy, kl or ppl.")] = "accuracy",
    tasks: Annotated[str | None, typer.Option(help="Rank by accuracy on these lm-eval tasks, comma-separated.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with further lm-eval tasks.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents a task.")] = None,
    batch_size: BatchSize = 8,
    seed: int = 0,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    json: Json = False,
    recipe: Recipe = None,
) -> None:
    """Measure what dropping each attention block's sync point costs, and rank the blocks."""
    from spd_calib.errors import InputError
    from spd_calib.formats.common import Strategy, TensorParallel
    from spd_calib.formats.files import check_writable, dumps, write_text
    from spd_calib.formats.profile import Profile
    from spd_calib.parallel.session import open_session
    from spd_calib.sensitivity import profile as profiling

    from .options import check_dtype, provenance, resolve_device, resolve_model
    from .shared import load_text_for, note_of, resolve_tasks
    from .terminal import print_json, say, working

    strategies = _strategies(strategy)
    if method not in ("single", "cumulative"):
        raise InputError(f"--method {method!r} is neither single nor cumulative.")
    if rank_by not in ("accuracy", "kl", "ppl"):
        raise InputError(f"--rank-by {rank_by!r} is none of accuracy, kl, ppl.")
    device, dtype = resolve_device(device), check_dtype(dtype)
    check_writable(output)
    session = open_session(resolve_model(model), tp)
    text = load_text_for(session, data, seq_len, min_len, max_samples, verify_samples, pack)
    if text.note:
        say(text.note)
    suite = None
    if tasks:
        from spd_calib.evaluation.harness import TaskSuite

        suite = TaskSuite(*resolve_tasks(tasks, include_path), limit, seed)
    lm = session.load(device, dtype, seed)
    say(
        f"{session.ref.architecture}, {lm.num_blocks} blocks, TP {tp}: {len(text.calibration)} sequences to measure "
        f"on, {len(text.verification)} kept for verifying"
    )
    plan = list(profiling.drops(method, strategies, lm.num_blocks))  # type: ignore[arg-type]
    batches = -(-len(text.calibration) // batch_size) + bool(suite)
    said: list[bool] = []
    with working("profile", len(plan) * batches) as work:

        def tick(i: int, tally) -> None:
            note = note_of(plan[i], tally)
            if tally is not None and not said:
                said.append(True)
                say(f"first batch: {note}")
            work.step(note)

        baseline, measurements = profiling.profile(
            lm,
            text.calibration,
            method,  # type: ignore[arg-type]
            strategies,
            batch_size,
            tick,
            (lambda: suite.accuracy(lm, session.tokenizer, batch_size)) if suite else None,
        )
    document = Profile(
        model=session.ref.model_copy(update={"id": model}),
        tensor_parallel=TensorParallel(size=tp),
        method=method,  # type: ignore[arg-type]
        rank_by=rank_by,  # type: ignore[arg-type]
        text=text.calibration_ref(),
        verify_text=text.verification_ref(),
        baseline=baseline,
        measurements=measurements,
        provenance=provenance(seed, device, dtype),
    )
    write_text(output, dumps(document))
    for s in strategies:
        _print_ranking(document, Strategy(s))
    say(f"written: {output}; next: spd-calib plan {output} --max-ppl-increase 1% -o plan.json")
    if json:
        print_json(dumps(document))


def _strategies(names: list[str] | None):
    from spd_calib.errors import InputError
    from spd_calib.formats.common import Strategy

    allowed = [Strategy.BLOCK_DROP, Strategy.PLAIN_DROP]
    if wrong := [n for n in names or [] if n not in allowed]:
        raise InputError(f"--strategy {wrong[0]!r} cannot be measured; it is block_drop or plain_drop.")
    return list(dict.fromkeys(map(Strategy, names))) if names else allowed


def _print_ranking(document, strategy) -> None:
    from .terminal import table

    by_block = document.of(strategy)
    value = document.sensitivity(strategy)
    unit = {"accuracy": "accuracy lost", "kl": "KL", "ppl": "perplexity"}[document.rank_by]
    rows = [
        [
            str(block),
            f"{value[block]:.4f}",
            f"{by_block[block].kl:.4f} ± {by_block[block].kl_stderr:.4f}",
            f"{100 * by_block[block].ppl_increase:+.2f} %",
            f"{100 * by_block[block].accuracy_drop:+.2f} ± {100 * by_block[block].accuracy_drop_stderr:.2f}",
            f"{100 * by_block[block].top1_agreement:.1f} %",
        ]
        for block in document.ranking(strategy)
    ]
    cumulative = "" if document.method == "single" else " (blocks dropped from here to the last)"
    table(
        f"{strategy}, least sensitive block first{cumulative}",
        ["block", unit, "KL", "ppl", "top-1 lost, points", "agreement"],
        rows,
    )
