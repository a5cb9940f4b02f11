"""spd-calib lm-eval: lm-eval's own command line, with the model `spd_calib` registered."""

import typer


def register(app: typer.Typer) -> None:
    app.command(
        "lm-eval",
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
        epilog="Example: spd-calib lm-eval run --model spd_calib --model_args plan=plan.json --tasks arc_easy",
    )(lm_eval)


def lm_eval(ctx: typer.Context) -> None:
    """Hand every argument to lm-eval, which then knows --model spd_calib --model_args plan=plan.json."""
    from spd_calib.api.opening import place_of
    from spd_calib.evaluation.lm_eval_model import run_command_line

    raise typer.Exit(run_command_line(ctx.args, place_of))
