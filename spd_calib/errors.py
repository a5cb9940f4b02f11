"""The errors that people are told of, in one sentence each: the thing, the cause, the way out."""


class SpdError(Exception):
    """The answer is no: a budget that cannot be met, a check that fails."""

    exit_code = 1


class InputError(SpdError):
    """The input cannot be used: a file, a model, a number."""

    exit_code = 2


class OtherModel(InputError):
    """A file is of another model than the one at hand."""
