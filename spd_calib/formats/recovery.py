"""recovery.json: what `recover` tried on a plan's blocks, and the text that the new checkpoint was fitted on."""

from typing import Any, Literal

from pydantic import Field

from .common import Count, Finite, Part, Tier

REPORT_FILE = "recovery.json"  # in the checkpoint's folder


class Attempt(Part):
    """One treatment tried.

    What is done to a block without training is judged by the error at its output, in `detail`; it has no KL.
    """

    block: Count | None = Field(description="null: of all treated blocks at once")
    treatment: str
    kl_before: Finite | None = Field(default=None, description="Of the whole plan; null where its error was judged")
    kl_after: Finite | None = Field(default=None, description="Likewise; null, too, where it is no finite number")
    fell: Finite | None = Field(default=None, description="By how much that KL fell, paired over sequences")
    fell_stderr: Finite | None = Field(default=None, description="Standard error of it: what stays falls by more")
    kept: bool = Field(description="Whether it stayed")
    seconds: Finite
    detail: dict[str, Any] = Field(
        default_factory=dict,
        description="error_before, error_after: at the block's output, as a share of it (of a training: its loss on "
        "the text to choose by); form, rank and ridge that were chosen; undone: it stayed at first, and was taken back",
    )


class Recovery(Part):
    format: Literal["spd-calib/recovery"] = "spd-calib/recovery"
    version: Literal[1] = 1
    tiers: dict[str, Tier] = Field(description="By block: what it is given without refit, and whether it is trained")
    tiers_from: str = Field(description="Where the tiers come from, in a sentence")
    kl_as_is: Finite = Field(description="Of the whole plan before, nats a token, on the sequences that decide")
    kl: Finite = Field(description="The same afterwards")
    attempts: list[Attempt]
    documents: dict[str, Count | None] = Field(
        description="The documents that it was fitted on or judged by, by the sha256 of their content: how many of "
        "their tokens, or null for all. What is measured on the checkpoint leaves them out"
    )
