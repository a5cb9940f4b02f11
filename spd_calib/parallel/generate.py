"""Text from a model on its ranks, with the KV cache. Real ranks run in lockstep, each choosing the same tokens."""

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .model import TensorParallelLM


@torch.no_grad()
def continue_text(
    lm: TensorParallelLM,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt: str,
    new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """Return the prompt and up to `new_tokens` tokens behind it: the likeliest at temperature 0, else drawn by `seed`.

    Runs what `lm` runs at present. Raises InputError as lm.refuse_nonfinite where the logits are not finite.
    """
    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt").to(lm.device)
    how: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with lm.refusing_nonfinite():
        ids = lm.model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, pad_token_id=pad, **how)  # type: ignore[operator]
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))
