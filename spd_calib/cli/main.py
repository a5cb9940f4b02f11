"""`spd-calib`: one command a file. Heavy imports wait inside the commands, so that help answers at once."""

import sys

import typer

from spd_calib.parallel.ending import ending_together

from . import bench, check, demo, diff, eval, generate, lm_eval, plan, profile, recover, report
from .help import Command

app = typer.Typer(
    name="spd-calib",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="Find out which all-reduces of a tensor-parallel language model can go; plan, verify and evaluate it.",
    epilog="A first try: spd-calib demo. Any command takes --debug to show a traceback with an error.",
)
for module in (profile, plan, recover, eval, check, bench, generate, report, diff, demo, lm_eval):
    module.register(app)
for command in app.registered_commands:
    command.cls = Command


def main() -> None:
    """Run the command line. Exit codes: 0 done; 1 the answer is no; 2 unusable input; 130 interrupted."""
    debug = "--debug" in sys.argv
    sys.argv[:] = [a for a in sys.argv if a != "--debug"]
    try:
        with ending_together(debug):
            app()
    except (KeyboardInterrupt, SystemExit) as e:
        if isinstance(e, SystemExit) and e.code != 130:  # which is what typer makes of an interrupt
            raise
        print("spd-calib: interrupted; no file is left half written.", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
