"""The record of a runtime's run of some prompts, which a check compares with the simulation."""

from pydantic import BaseModel, ConfigDict


class Observed(BaseModel):
    """One run of all prompts; lists of lists hold one list a prompt, or a rank."""

    # a runtime that overflows is to be found out, so NaN has to survive the way through a file
    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")

    prompt: list[list[float]]  # by prompt, log p of each of its tokens but the first
    tokens: list[list[int]]  # by prompt, the tokens of its greedy continuation
    chosen: list[list[float]]  # by prompt, log p of these
    all_reduces: list[list[int]]  # by rank, the number in each forward
    streams: list[list[str]] = []
    """By rank, a digest of the residual stream after each block over all forwards; empty where a runtime hides it."""
    experts: list[list[str]] = []
    """By rank, a digest of the experts chosen in each mixture of experts over all forwards; empty without any."""
    bytes: list[list[int]] = []
    """By rank, the bytes of each block's messages, prompts and continuations; empty where a runtime hides them."""
