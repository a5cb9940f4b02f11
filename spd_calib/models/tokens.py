"""Token ids that the embedding has no row for: a tokenizer may know more tokens than the model it lies beside.

Many sound checkpoints come with such a tokenizer (a padding token added and never trained, say), and as long as no
text holds these tokens nothing is wrong: so it is their use that is refused.
"""

from torch import Tensor, nn
from transformers import PreTrainedModel

from spd_calib.errors import InputError


def guard_embedding(model: PreTrainedModel) -> None:
    """Have `model` raise InputError for token ids beyond its embedding, whoever they come from."""
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding), "transformers' decoders have one"
    embedding.register_forward_pre_hook(_check_ids)


def _check_ids(embedding: nn.Embedding, args: tuple[Tensor, ...]) -> None:
    """Raise InputError where the first of `args`, token ids [B, T], has no row in the embedding's weight [V, d].

    A single id a row is not looked at: while text is generated these are the model's own choice of its V tokens, and a
    GPU would have to be waited for at every one of them.
    """
    ids, rows = args[0], len(embedding.weight)
    if ids.is_meta or ids.numel() == 0 or ids.shape[-1] == 1:
        return
    smallest, largest = (int(i) for i in ids.aminmax())
    if smallest < 0 or largest >= rows:
        raise InputError(
            f"The tokenizer gives the token id {largest if largest >= rows else smallest}, and the model's embedding "
            f"has rows 0 to {rows - 1} only; use the tokenizer that the model was trained with, or text without that "
            "token."
        )
