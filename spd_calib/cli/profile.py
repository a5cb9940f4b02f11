"""spd-calib profile: what dropping each sync point costs."""

from pathlib import Path
from typing import Annotated

import typer

from .options import COMMON, DTYPES, BatchSize, Device, Json, Recipe, Seed

TEXT, METHOD, RUN = "Text", "What is measured", "How it runs"
TARGET_STDERR = 0.08


def register(app: typer.Typer) -> None:
    app.command(
        "profile", epilog="Example: spd-calib profile meta-llama/Llama-2-7b-hf --tp 8 --data wikitext --pack -o p.json"
    )(profile)


def profile(
    model: Annotated[str, typer.Argument(help="Hub id, local folder, or 'demo'.")],
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel size: the number of ranks.")],
    data: Annotated[
        list[str],
        typer.Option(metavar="TEXT", help="'demo', .jsonl, .txt, .parquet, hub NAME[:CONFIG[:SPLIT]]; repeatable."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The profile.")] = Path("profile.json"),
    seq_len: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of a document used [2048, or the model's limit].", rich_help_panel=TEXT),
    ] = None,
    min_len: Annotated[
        int | None, typer.Option(min=2, help="Leave out shorter documents [--seq-len].", rich_help_panel=TEXT)
    ] = None,
    max_samples: Annotated[int, typer.Option(min=1, help="Sequences measured on.", rich_help_panel=TEXT)] = 128,
    verify_samples: Annotated[
        int, typer.Option(min=1, help="Sequences after those, kept for verifying.", rich_help_panel=TEXT)
    ] = 64,
    pack: Annotated[
        bool, typer.Option("--pack", help="Glue documents together, cut them at --seq-len.", rich_help_panel=TEXT)
    ] = False,
    strategy: Annotated[
        list[str] | None, typer.Option(help="block_drop or plain_drop; repeatable [both].", rich_help_panel=METHOD)
    ] = None,
    sync_points: Annotated[
        str, typer.Option(metavar="KINDS", help="attention, mlp, or both with a comma.", rich_help_panel=METHOD)
    ] = "attention",
    method: Annotated[
        str, typer.Option(help="single, cumulative or fisher (fast).", rich_help_panel=METHOD)
    ] = "single",
    target_stderr: Annotated[
        float | None, typer.Option(help="fisher: relative error of sampling [0.08].", rich_help_panel=METHOD)
    ] = None,
    confidence: Annotated[
        float | None, typer.Option(help="single: stop once a tier is as certain, say 0.95.", rich_help_panel=METHOD)
    ] = None,
    rank_by: Annotated[
        str | None,
        typer.Option(metavar="METRIC", help="accuracy, kl or ppl [accuracy; fisher: kl].", rich_help_panel=METHOD),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES", help="Rank by accuracy on lm-eval tasks, comma-separated.", rich_help_panel=METHOD
        ),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder with further lm-eval tasks.", rich_help_panel=METHOD)
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents a task.", rich_help_panel=METHOD)] = None,
    batch_size: BatchSize = 8,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(metavar="|".join(DTYPES), rich_help_panel=COMMON)] = "float32",
    stream: Annotated[
        bool, typer.Option("--stream", help="Read each block from disk when it runs.", rich_help_panel=RUN)
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what would be run, how long and in how much memory.", rich_help_panel=RUN),
    ] = False,
    json: Json = False,
    recipe: Recipe = None,
) -> None:
    """Measure what dropping each block's sync points costs, and rank the blocks."""
    import json as jsonlib

    from spd_calib.errors import InputError
    from spd_calib.formats.common import TensorParallel
    from spd_calib.formats.files import check_writable, dumps, write_text
    from spd_calib.formats.profile import Profile
    from spd_calib.parallel.session import open_session, versions
    from spd_calib.ranks import world_size
    from spd_calib.report import tables
    from spd_calib.sensitivity import profile as profiling
    from spd_calib.sensitivity.fisher import fisher as predict
    from spd_calib.sensitivity.journal import Journal
    from spd_calib.sensitivity.texts import average_fisher, average_profile, joint_ref

    from .estimate import print_estimate
    from .options import check_dtype, provenance, resolve_device, resolve_model
    from .recovered import find_recovered
    from .shared import load_text_for, note_of, resolve_tasks
    from .terminal import print_json, say, table, working

    if method not in ("single", "cumulative", "fisher"):
        raise InputError(f"--method {method!r} is none of single, cumulative, fisher.")
    strategies, kinds = _strategies(strategy, method), _sync_points(sync_points, method)
    if method == "fisher":
        _check_fisher(target_stderr, rank_by, tasks)
    elif target_stderr is not None:
        raise InputError(f"--target-stderr belongs to --method fisher, not to {method}; leave it out.")
    _check_confidence(confidence, method)
    _check_texts(data, confidence)
    rank_by = rank_by or ("kl" if method == "fisher" else "accuracy")
    if rank_by not in ("accuracy", "kl", "ppl"):
        raise InputError(f"--rank-by {rank_by!r} is none of accuracy, kl, ppl.")
    device, dtype = resolve_device(device), check_dtype(dtype)
    check_writable(output)
    session = open_session(resolve_model(model), tp)
    recovered, skip = find_recovered(session), 0
    if recovered:
        recovered.check_profiling(method, confidence, tasks, data)
        skip, seq_len, min_len, pack = recovered.beyond_fitted(data[0], seq_len, min_len, pack)
    texts = [load_text_for(session, d, seq_len, min_len, max_samples, verify_samples, pack, skip) for d in data]
    for text in texts:
        if text.note:
            say(text.note)
    text_ref = joint_ref([t.calibration_ref() for t in texts])
    verify_ref = joint_ref([t.verification_ref() for t in texts])
    suite = None
    if tasks:
        from spd_calib.evaluation.harness import TaskSuite
        from spd_calib.evaluation.options import EvalOptions

        options = EvalOptions(limit=limit, batch_size=batch_size)
        suite = TaskSuite(*resolve_tasks(tasks, include_path), options=options)
    lm, dense = (
        recovered.load(session, device, dtype, seed, stream)
        if recovered
        else (session.load(device, dtype, seed, stream), None)
    )
    if lm.streamed:
        say("the weights are read from disk, block by block, as they are needed")
    say(
        f"{session.ref.architecture}, {lm.num_blocks} blocks, TP {tp}: {text_ref.sequences} sequences to measure on, "
        f"{verify_ref.sequences} kept for verifying"
    )
    if recovered:
        say(recovered.said(skip))
    if dry_run:
        found = print_estimate(
            lm, texts, method, strategies, kinds, target_stderr or TARGET_STDERR, batch_size, bool(tasks)
        )
        if json:
            print_json(jsonlib.dumps(found, indent=1) + "\n")
        return
    journal = Journal(
        output.with_name(output.name + ".journal"),
        {
            "model": session.ref.model_dump(mode="json", exclude={"id"}),
            "text": text_ref.sha256,
            "tensor parallel size": tp,
            "method": [method, target_stderr, confidence],
            "list of experiments": [strategies, kinds],
            "batch size": batch_size,
            "lm-eval tasks": [tasks, str(include_path), limit, seed] if tasks else None,
            "seed": seed,
            "recovered checkpoint": recovered and recovered.sha256,
            "device, dtype or number of real ranks": [device, dtype, world_size()],
            "version of spd-calib, torch or transformers": versions(),
        },
    )
    if journal.finished:
        say(f"going on from {journal.path}: {journal.finished} measurements are finished")
    journals: list = [journal] if len(texts) == 1 else [journal.of_text(number) for number in range(len(texts))]
    batches = sum(-(-len(t.calibration) // batch_size) for t in texts)
    measurements: list = []
    fisher = alone = None
    if method == "fisher":
        with working("profile") as work:
            predicted = []
            for text, own_journal in zip(texts, journals, strict=True):

                def step(batches: int = -(-len(text.calibration) // batch_size)) -> None:
                    if work.done == work.total:  # a text, or the error found asks for another pass
                        work.expect(batches)
                    work.step()

                target = target_stderr or TARGET_STDERR
                predicted.append(predict(lm, text.calibration, kinds, target, batch_size, seed, step, own_journal))
            baseline, fisher = average_fisher(predicted)
    else:
        plan = list(profiling.drops(method, strategies, lm.num_blocks, kinds, profiling.settled_points(lm)))  # type: ignore[arg-type]
        if not plan:
            raise InputError(f"{model} drops every such sync point already; there is nothing left to profile.")
        said: list[bool] = []
        with working("profile", len(plan) * (batches + bool(suite))) as work:

            def tick(i: int, tally) -> None:
                note = note_of(plan[i], tally)
                if tally is not None and not said:
                    said.append(True)
                    say(f"first batch: {note}")
                work.step(note)

            each = []
            for number, text in enumerate(texts):
                of_baseline, of_text, alone = profiling.profile(
                    lm,
                    text.calibration,
                    method,  # type: ignore[arg-type]
                    strategies,
                    batch_size,
                    tick,
                    (lambda: suite.accuracy(lm, session.tokenizer)) if suite and number == 0 else None,
                    kinds,
                    journals[number],
                    confidence,
                    dense,
                )
                each.append((of_baseline, of_text))
            baseline, measurements = average_profile(each)
    document = Profile(
        model=session.ref.model_copy(update={"id": model}),
        tensor_parallel=TensorParallel(size=tp),
        method=method,  # type: ignore[arg-type]
        rank_by=rank_by,  # type: ignore[arg-type]
        text=text_ref,
        verify_text=verify_ref,
        baseline=baseline,
        measurements=measurements,
        fisher=fisher,
        recovered=recovered.part(alone) if recovered and alone else None,
        provenance=provenance(seed, device, dtype),
    )
    write_text(output, dumps(document))
    if early := sum(m.stopped_early for m in measurements):
        say(
            f"{early} of {len(measurements)} sync points needed less than all {document.text.sequences} sequences: "
            "their tier by KL was certain enough"
        )
    journal.remove()
    if fisher:
        say(f"{fisher.samples} samples a sequence, which leave {100 * fisher.sampling_error:.1f} % of error in a KL")
    for shown in (*tables.rankings(document), *tables.by_text(document)):
        table(*shown)
    say(f"written: {output}; next: spd-calib plan {output} --max-ppl-increase 1% -o plan.json")
    if json:
        print_json(dumps(document))


def _strategies(names: list[str] | None, method: str):
    from spd_calib.errors import InputError
    from spd_calib.formats.common import Strategy

    allowed = [Strategy.BLOCK_DROP, Strategy.PLAIN_DROP]
    if wrong := [n for n in names or [] if n not in allowed]:
        raise InputError(f"--strategy {wrong[0]!r} cannot be measured; it is block_drop or plain_drop.")
    if method == "fisher":
        if Strategy.PLAIN_DROP in (names or []):
            raise InputError("--method fisher predicts block_drop alone; measure plain_drop with --method single.")
        return [Strategy.BLOCK_DROP]
    return list(dict.fromkeys(map(Strategy, names))) if names else allowed


def _sync_points(text: str, method: str) -> list:
    from spd_calib.errors import InputError

    kinds = list(dict.fromkeys(kind.strip() for kind in text.split(",")))
    if wrong := [kind for kind in kinds if kind not in ("attention", "mlp")]:
        raise InputError(f"--sync-points {wrong[0]!r} is neither attention nor mlp.")
    if method == "cumulative" and "mlp" in kinds:
        raise InputError(
            "--method cumulative is the paper's, of the attention's sync points; take single for the MLP's."
        )
    return sorted(kinds)


def _check_fisher(target_stderr: float | None, rank_by: str | None, tasks: str | None) -> None:
    from spd_calib.errors import InputError
    from spd_calib.ranks import world_size

    if target_stderr is not None and not 0.001 <= target_stderr <= 1:
        raise InputError(f"--target-stderr {target_stderr} is no relative error from 0.001 to 1; 0.08 is a good one.")
    if rank_by not in (None, "kl") or tasks:
        raise InputError("--method fisher predicts KL alone; rank by accuracy or perplexity with --method single.")
    if world_size() > 1:
        raise InputError("--method fisher runs on simulated ranks alone; start it without torchrun.")


def _check_texts(data: list[str], confidence: float | None) -> None:
    from spd_calib.errors import InputError

    if len(set(data)) < len(data):
        raise InputError("--data names one text twice; name each once.")
    if len(data) > 1 and confidence is not None:
        raise InputError("Several texts are measured to their end: leave --confidence out.")


def _check_confidence(confidence: float | None, method: str) -> None:
    from spd_calib.errors import InputError

    if confidence is not None and method != "single":
        raise InputError(f"--confidence belongs to --method single, not to {method}; leave it out.")
    if confidence is not None and not 0.5 <= confidence < 1:
        raise InputError(f"--confidence {confidence} is no probability from 0.5 to below 1; 0.95 is a good one.")
