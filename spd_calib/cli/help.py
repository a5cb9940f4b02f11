"""The command class of all commands: --help by group, one line an option, in 80 columns; flags in errors."""

import textwrap
from typing import Any

import typer
from typer.core import TyperArgument, TyperCommand, TyperOption

from .flags import naming_flags
from .options import COMMON

WORDS = {"int": "N", "int range": "N", "float": "X", "float range": "X", "path": "PATH"}


class Command(TyperCommand):
    """Options by their rich_help_panel, in the order in which they appear; COMMON, one behind the other, comes last.

    An SpdError of a command names its options (flags.py).
    """

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        group = getattr(ctx.parent, "command", None)
        others = getattr(group, "commands", {}).values()
        with naming_flags(self, [c for c in others if isinstance(c, TyperCommand)]):
            return super().invoke(ctx)

    def format_options(self, ctx: typer.Context, formatter: Any) -> None:  # type: ignore[override]
        groups: dict[str, list[Any]] = {}
        for param in self.get_params(ctx):
            if isinstance(param, TyperArgument | TyperOption) and not param.hidden and param.name != "help":
                groups.setdefault(param.rich_help_panel or "Options [and their defaults]", []).append(param)
        common = groups.pop(COMMON, [])
        formatter.write_paragraph()
        rows = {group: [_record(p, ctx) for p in params] for group, params in groups.items()}
        width = max((len(name) for group in rows.values() for name, _ in group), default=0)
        for group, records in rows.items():
            formatter.write(f"{group}:\n")
            with formatter.indentation():
                formatter.write_dl([(name.ljust(width), text) for name, text in records], col_max=width)
        others = [" ".join((name, text)).strip() for name, text in (_record(p, ctx) for p in common)]
        if others:
            formatter.write(f"{COMMON}:\n")
            text = "; ".join([*others, "-h, --help"]).replace(" [", "\N{NO-BREAK SPACE}[")
            lines = textwrap.wrap(text, formatter.width - 2, break_on_hyphens=False)  # options stay whole
            formatter.write("".join(f"  {line}\n" for line in lines))


def _record(param: TyperArgument | TyperOption, ctx: typer.Context) -> tuple[str, str]:
    """Return a parameter's name with the kind of its value, and its help with the default."""
    name = ", ".join(sorted(param.opts, key=len)) if isinstance(param, TyperOption) else str(param.name)
    if isinstance(param, TyperOption) and not param.is_flag:
        kind = (param.display_type(ctx) or "").strip("<>")
        name += f" {param.metavar or WORDS.get(kind, 'NAME')}"
    default = "required" if param.required else param.default
    known = default is not None and default is not False and default != ""
    return name, f"{param.help or ''} [{default}]".strip() if known else param.help or ""
