"""Options that several commands share, and recipes."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from spd_calib.errors import InputError

COMMON = "As in other commands"  # the group of --help that takes little room
DTYPES = ("float32", "bfloat16", "float16")
BatchSize = Annotated[int, typer.Option(min=1, help="sequences at a time", rich_help_panel=COMMON)]
Seed = Annotated[int, typer.Option(metavar="N", rich_help_panel=COMMON)]
Device = Annotated[str, typer.Option(metavar="cpu|cuda|cuda:N", rich_help_panel=COMMON)]
Dtype = Annotated[
    str | None,
    typer.Option(metavar="|".join(DTYPES), help="[as before]", rich_help_panel=COMMON),
]
Json = Annotated[bool, typer.Option("--json", help="also on stdout", rich_help_panel=COMMON)]
ModelPlace = Annotated[
    str | None, typer.Option("--model", metavar="MODEL", help="[as the file says]", rich_help_panel=COMMON)
]
MAX_RECIPE_BYTES = 2**20
WRITTEN = ("output", "pareto", "png", "log_samples")  # options that name what is written


def _load_recipe(ctx: typer.Context, value: Path | None) -> Path | None:
    """Make the recipe's section of the command's name its defaults."""
    if value is not None:
        ctx.default_map = {**(ctx.default_map or {}), **section(value, ctx.info_name or "", ctx)}
    return value


Recipe = Annotated[
    Path | None,
    typer.Option(
        callback=_load_recipe,
        is_eager=True,
        metavar="FILE",
        help="YAML of defaults",
        rich_help_panel=COMMON,
    ),
]


def arguments(words: str, option: str) -> list[str]:
    """Return a command line's arguments, from one string. Raises InputError, naming `option`, for an open quotation."""
    try:
        return shlex.split(words)
    except ValueError as e:
        raise InputError(f"`{option}` {words!r} is no command line: {str(e).lower()}; close it.") from None


def section(path: Path, command: str, ctx: typer.Context) -> dict[str, Any]:
    """Return the section `command` of a recipe. Raises InputError for a file or a key that cannot be used."""
    recipe = read_recipe(path)
    if command not in recipe:
        raise InputError(f"{path} has no section {command!r}; it has {', '.join(map(repr, recipe)) or 'none'}.")
    given = recipe[command] or {}
    known = {p.name for p in ctx.command.params if p.name not in (None, "recipe", "help")}
    values = {str(key).replace("-", "_"): value for key, value in given.items()}
    if unknown := sorted(set(values) - known):
        raise InputError(f"{path}: {command} takes no {unknown[0]!r}; it takes {', '.join(sorted(map(str, known)))}.")
    for key, value in values.items():
        _check_value(path, key, value=value)
    for p in ctx.command.params:
        if getattr(p, "multiple", False) and p.name in values and not isinstance(values[p.name], list):
            values[p.name] = [values[p.name]]
    return {k: str(v) if isinstance(v, int | float) and not isinstance(v, bool) else v for k, v in values.items()}


def _check_value(recipe: Path, key: str, *, value: Any) -> None:
    """Refuse what only a person at the command line may ask for: running code, writing somewhere else."""
    plain = str | int | float | None
    if not isinstance(value, plain) and not (isinstance(value, list) and all(isinstance(v, plain) for v in value)):
        raise InputError(f"{recipe}: {key} must be one value, or a list of them.")
    if key == "include_path" or (key == "tasks" and ("/" in str(value) or ".y" in str(value))):
        raise InputError(f"{recipe}: task files may hold code, so {key} is taken from the command line alone.")
    places = [folder.resolve() for folder in (Path(), recipe.parent)]
    if key in WRITTEN and not any(Path(str(value)).expanduser().resolve().is_relative_to(p) for p in places):
        raise InputError(
            f"{recipe}: {key} {value} lies neither below this folder nor below the recipe's; give it on the command "
            "line instead."
        )


def read_recipe(path: Path) -> dict[str, Any]:
    import yaml

    try:
        if path.stat().st_size > MAX_RECIPE_BYTES:
            raise InputError(f"{path} is larger than {MAX_RECIPE_BYTES >> 20} MiB: it is no recipe.")
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(f"The recipe {path} cannot be read: {e.strerror}.") from None
    except (yaml.YAMLError, ValueError, RecursionError):
        raise InputError(f"The recipe {path} is not valid YAML.") from None
    if not isinstance(recipe, dict) or not all(isinstance(v, dict | None) for v in recipe.values()):
        raise InputError(f"The recipe {path} must hold a section a command, each with its options.")
    return recipe
