"""spd-calib check: is a plan valid, does it fit the model, is it fresh?"""

from pathlib import Path
from typing import Annotated

import typer

from .options import Json, Recipe


def register(app: typer.Typer) -> None:
    app.command("check", epilog="Example: spd-calib check plan.json")(check)


def check(
    plan: Annotated[Path, typer.Argument(help="Written by spd-calib plan.")],
    json: Json = False,
    recipe: Recipe = None,
) -> None:
    """Check a plan against its schema, its model's form and its model's weights."""
    from spd_calib.errors import SpdError
    from spd_calib.formats.files import dumps, read
    from spd_calib.formats.plan import Plan
    from spd_calib.models.load import check_config, locate, model_ref, read_config
    from spd_calib.parallel.session import check_same_model

    from .options import resolve_model
    from .terminal import print_json, table

    planned = read(Plan, plan)
    source = locate(resolve_model(planned.model.id), planned.model.revision)
    config = read_config(source)
    try:
        check_same_model(planned.model, model_ref(source, config))
    except SpdError as e:
        e.exit_code = 1  # here the question itself was whether they fit
        raise
    check_config(config, planned.tensor_parallel.size)
    table(
        f"{plan}",
        ["check", "found"],
        [
            ["valid against the schema", f"format {planned.format}, version {planned.version}"],
            ["fits the model", f"{planned.model.architecture}, {planned.model.num_blocks} blocks"],
            ["fresh", f"weights {planned.model.weight_fingerprint[:16]}…"],
            ["TP size divides", str(planned.tensor_parallel.size)],
            ["drops", f"{len(planned.dropped)} of {planned.model.num_blocks} attention all-reduces"],
        ],
        left=2,
    )
    if json:
        print_json(dumps(planned))
