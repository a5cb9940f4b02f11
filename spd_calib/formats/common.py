"""The parts that the travelling files share: references to models and text, provenance."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
Tier = Literal["insensitive", "sensitive", "extremely sensitive"]  # the paper's classes of blocks
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def left_out_if_empty(description: str) -> Any:
    """Return the field of a list that is written only where it holds something."""
    return Field(default_factory=list, exclude_if=lambda value: not value, description=description)


class Part(BaseModel):
    """Base of everything in a file: unknown fields are refused, values are never changed silently."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelRef(Part):
    """Names the model that a file speaks of, exactly enough to notice another one."""

    id: str = Field(min_length=1, description="As given: a hub id, a local folder, or 'demo'")
    revision: str | None = Field(default=None, description="Commit of the hub repository, where it came from there")
    architecture: str = Field(description="Class of the model, e.g. LlamaForCausalLM")
    num_blocks: int = Field(gt=0, description="Number of decoder blocks")
    config_hash: Sha256 = Field(description="sha256 of the model's configuration, sorted JSON")
    weight_fingerprint: Sha256 = Field(description="sha256 over name, dtype, shape and bytes of every tensor on disk")
    quantised: str | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description="How its weights are quantised, and what of that was measured",
    )


class TextRef(Part):
    """Names the token sequences that a measurement was made on."""

    source: str = Field(min_length=1, description="As given to --data; of several texts all, with commas")
    column: str = Field(
        default="text",
        min_length=1,
        exclude_if=lambda value: value == "text",
        description="Column or JSON key that holds the documents",
    )
    seq_len: int = Field(ge=2, description="Tokens of a document that are used, at most")
    min_len: int = Field(ge=2, description="Documents with fewer tokens are left out")
    pack: bool = Field(description="Documents glued together and cut into sequences of seq_len tokens")
    first: Count = Field(
        description="Index of the first sequence used, in file order, among those long enough that repeat none before, "
        "and that nothing was fitted on"
    )
    sequences: int = Field(gt=0)
    tokens: int = Field(gt=0, description="Tokens in these sequences, special tokens included")
    sha256: Sha256 = Field(description="Of the token ids, sequence by sequence; of several texts, of their sha256")
    parts: list["TextRef"] = left_out_if_empty("Each text, where there are several; the rest then speaks of all")

    @property
    def each(self) -> list["TextRef"]:
        """Return the texts that this speaks of: itself, or each of several."""
        return self.parts or [self]


class TensorParallel(Part):
    size: int = Field(gt=0, description="Number of ranks")


class Provenance(Part):
    """The command, settings and versions that made a file. No dates: the same run gives the same file."""

    command: str
    seed: int
    device: str
    dtype: Literal["float32", "bfloat16", "float16"]
    versions: dict[str, str]
