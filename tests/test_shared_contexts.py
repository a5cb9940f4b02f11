"""A context read once for all its continuations: lm-eval's own answers, and fewer tokens."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from lm_eval.models.huggingface import HFLM

from spd_calib.errors import InputError
from spd_calib.evaluation.shared_contexts import share_contexts
from spd_calib.formats.drops import Drops, Point, Strategy
from spd_calib.parallel.model import TensorParallelLM

DROPS = Drops.of({Point(0, "attention"): Strategy.PLAIN_DROP, Point(1, "attention"): Strategy.BLOCK_DROP})


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer(vocab=tiny.SHAPE["vocab_size"])


def requests_of(vocab: int) -> list:
    """Four continuations of each of eight contexts, one of a context of its own, and one beyond the model's length."""
    generator = torch.Generator().manual_seed(0)

    def tokens(n: int) -> list[int]:
        return torch.randint(0, vocab, (n,), generator=generator).tolist()

    contexts = [tokens(n) for n in (20, 18, 18, 17, 16, 11, 9, 6)]
    shared = [(None, c, tokens(n)) for n in (1, 3, 5, 2) for c in contexts]
    return [*shared, (None, tokens(9), tokens(4)), (None, tokens(60), tokens(9)), (None, contexts[0], tokens(60))]


def answered(model, tokenizer, *, share: bool) -> tuple[list, int, int]:
    """Return the answers, how many tokens the model has read for them, and how often `step` was called."""
    read, steps = [0], [0]
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, max_length=64)
    if share:
        share_contexts(lm, step=lambda: steps.__setitem__(0, steps[0] + 1))
    hook = model.register_forward_pre_hook(
        lambda m, args, kwargs: read.__setitem__(0, read[0] + (args[0] if args else kwargs["input_ids"]).numel()),
        with_kwargs=True,
    )
    try:
        return lm._loglikelihood_tokens(requests_of(model.config.vocab_size), disable_tqdm=True), read[0], steps[0]
    finally:
        hook.remove()


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "gemma3"])
def test_the_answers_are_lm_evals(family, tokenizer):
    model = tiny.build(family)
    lm = TensorParallelLM.simulated(model, 2)
    with lm.running(DROPS):
        theirs, tokens, _ = answered(model, tokenizer, share=False)
        ours, fewer, steps = answered(model, tokenizer, share=True)
    assert [exact for _, exact in ours] == [exact for _, exact in theirs]
    assert [a for a, _ in ours] == pytest.approx([a for a, _ in theirs], abs=2e-4)
    if steps:
        assert steps == 32 and fewer < tokens


def test_a_choice_without_a_token_is_a_sentence(tokenizer):
    """It has no log-likelihood; lm-eval refuses it, too, and it would shift what is read of those behind it."""
    lm = HFLM(pretrained=tiny.build("llama"), tokenizer=tokenizer, batch_size=3, max_length=64)
    share_contexts(lm, step=lambda: None)
    with pytest.raises(InputError, match="a choice without a token"):
        lm._loglikelihood_tokens([(None, [1, 2], [3]), (None, [1, 2], []), (None, [1, 2], [4])], disable_tqdm=True)


def test_a_window_shorter_than_the_text_is_noticed(tokenizer):
    model = tiny.build("mistral_window")
    theirs, _, _ = answered(model, tokenizer, share=False)
    ours, _, steps = answered(model, tokenizer, share=True)
    assert not steps and ours == theirs


def test_in_bfloat16_nothing_is_shared(tokenizer):
    seen = SimpleNamespace(model=tiny.build("llama").bfloat16(), mixed_precision_dtype=None)
    seen._loglikelihood_tokens = before = object()
    share_contexts(seen, step=lambda: None)
    assert seen._loglikelihood_tokens is before
