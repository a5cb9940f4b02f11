"""spd-calib bench: what a sync costs on this machine, and what the plan saves."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Device, Dtype, Json, Recipe


def register(app: typer.Typer) -> None:
    app.command("bench", epilog="Example: spd-calib bench plan.json -o hardware.json")(bench)


def bench(
    plan: Annotated[Path, typer.Argument(help="Written by spd-calib plan.")],
    output: Annotated[Path, typer.Option("--output", "-o")] = Path("hardware.json"),
    rounds: Annotated[int, typer.Option(min=1, help="Turns in which everything is measured once.")] = 20,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences in a forward.")] = 1,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded behind it, each timed.")] = 16,
    device: Device = "auto",
    dtype: Dtype = None,
    json: Json = False,
    recipe: Recipe = None,
) -> None:
    """Time all-reduces by size, prefill and decode (dense, plan, every block dropped) on real ranks.

    Starts torchrun on this machine at the plan's TP size, or runs under the torchrun that started it.
    """
    from spd_calib.errors import InputError
    from spd_calib.formats.files import check_writable, dumps, read
    from spd_calib.formats.hardware import Hardware
    from spd_calib.formats.plan import Plan
    from spd_calib.ranks import is_main_rank, world_size
    from spd_calib.report import tables
    from spd_calib.runtimes.torchrun.launch import torchrun

    from .options import check_dtype, resolve_device
    from .terminal import print_json, say, table, working

    planned = read(Plan, plan)
    check_writable(output)
    device, dtype = resolve_device(device), check_dtype(dtype or planned.provenance.dtype)
    tp = planned.tensor_parallel.size
    if tp == 1:
        raise InputError("The plan is for one rank, which has nothing to sync; profile with a larger --tp.")
    if world_size() > 1:
        _on_this_rank(plan, output, rounds, batch_size, tokens, new_tokens, device, dtype)
    else:
        options = {"-o": output, "--rounds": rounds, "--batch-size": batch_size, "--tokens": tokens}
        options |= {"--new-tokens": new_tokens, "--device": device, "--dtype": dtype}
        with working(f"bench on {tp} ranks", None):
            words = [str(word) for option in options.items() for word in option]
            torchrun(tp, "spd_calib", ["bench", str(plan), *words])
    if not is_main_rank():  # it has written nothing, and has nothing to show
        return
    measured = read(Hardware, output)
    for found in tables.hardware(measured):
        table(*found)
    say(f"written: {output}")
    if json:
        print_json(dumps(measured))


def _on_this_rank(
    plan: Path, output: Path, rounds: int, batch: int, tokens: int, new_tokens: int, device: str, dtype: str
) -> None:
    from spd_calib.errors import InputError
    from spd_calib.formats.files import dumps, read, sha256_of, write_text
    from spd_calib.formats.hardware import Hardware
    from spd_calib.formats.plan import Plan
    from spd_calib.parallel.comm import GATHERED_AT_MOST
    from spd_calib.parallel.compensation import load_compensation
    from spd_calib.parallel.distributed import backend, local_size
    from spd_calib.parallel.session import open_session
    from spd_calib.ranks import world_size
    from spd_calib.runtimes.torchrun.bench import Settings, device_name, time_collectives, time_steps

    from .options import provenance, resolve_model
    from .terminal import working

    planned = read(Plan, plan)
    session = open_session(resolve_model(planned.model.id), planned.tensor_parallel.size, planned.model)
    if tokens + new_tokens > session.max_length:
        raise InputError(
            f"--tokens {tokens} and --new-tokens {new_tokens} are beyond the model's {session.max_length}; lower them."
        )
    compensation = load_compensation(planned, plan)
    lm = session.load(device, dtype)
    settings = Settings(rounds, batch, tokens, new_tokens)
    with working("bench", 2 * (rounds + 1)) as work:
        collectives = time_collectives(lm.device, lm.model.dtype, rounds=rounds, tick=work.step)
        steps = time_steps(lm, planned, compensation, settings, work.step)
    document = Hardware(
        model=planned.model,
        plan_sha256=sha256_of(plan),
        tensor_parallel=planned.tensor_parallel,
        device=device_name(lm.device),
        backend=backend(device),
        nodes=world_size() // local_size(),
        gathered_at_most=GATHERED_AT_MOST if lm.device.type == "cpu" else 0,
        collectives=collectives,
        steps=steps,
        provenance=provenance(0, device, dtype),
    )
    write_text(output, dumps(document))
