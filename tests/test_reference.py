"""The reference itself: it equals transformers' own forward where nothing is dropped, and does drop where it should."""

import pytest
import reference
import tiny
import torch
from transformers import PreTrainedModel

BLOCKS = 4
KEEP = ["keep_sync"] * BLOCKS
DROPS = {
    "block_drop": (["block_drop"] * BLOCKS, KEEP),
    "plain_drop": (["plain_drop"] * BLOCKS, KEEP),
    "mlp": (KEEP, ["block_drop"] * (BLOCKS - 1) + ["keep_sync"]),
    "mixture": (
        ["plain_drop", "block_drop", "keep_sync", "plain_drop"],
        ["keep_sync", "block_drop", "block_drop", "keep_sync"],
    ),
}
"""Name -> strategies of attention, strategies of the MLP."""

MODELS: dict[str, tuple[str, dict]] = {
    **{f"{family}-kv2": (family, {"kv_heads": 2}) for family in tiny.SUPPORTED if family != "minicpm3"},
    **{f"{family}-kv8": (family, {"kv_heads": 8}) for family in tiny.SUPPORTED if family != "opt"},
    "qwen2-some-windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "phi3-partial-rotary-tied": (
        "phi3",
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
            "tie_word_embeddings": True,
        },
    ),
    "gemma-odd-width": ("gemma", {"hidden": 72}),
}
"""Name -> arguments of `tiny.build`."""


def dense(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """transformers' own logits."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        if mask is None:
            return model(ids).logits.double()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)  # as `generate` counts them
        return model(ids, attention_mask=mask, position_ids=positions).logits.double()


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest absolute difference."""
    return float((a - b).abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_keeping_every_sync_point_is_the_dense_model(name: str) -> None:
    family, overrides = MODELS[name]
    model = tiny.build(family, **overrides)
    ids = tiny.tokens(2, 12)
    expected = dense(model, ids)
    for tp in (1, 2, 4, 8):
        assert gap(reference.logits(model, ids, tp, KEEP), expected) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_left_padding_changes_nothing_for_the_real_tokens(name: str) -> None:
    family, overrides = MODELS[name]
    model = tiny.build(family, **overrides)
    ids, mask = tiny.left_padded(tiny.tokens(3, 12), pads=(0, 4, 9))
    real = mask.bool()
    got = reference.logits(model, ids, 4, KEEP, attention_mask=mask)
    assert gap(got[real], dense(model, ids, mask)[real]) < 1e-5
    assert not got[~real].any()


@pytest.mark.parametrize("drop", DROPS)
@pytest.mark.parametrize("family", tiny.SUPPORTED)
def test_one_rank_has_nothing_to_drop(family: str, drop: str) -> None:
    model = tiny.build(family)
    ids = tiny.tokens(1, 8)
    attention, mlp = DROPS[drop]
    assert gap(reference.logits(model, ids, 1, attention, mlp), dense(model, ids)) < 1e-5


@pytest.mark.parametrize("family", tiny.SUPPORTED)
def test_each_way_of_dropping_shows_and_is_its_own(family: str) -> None:
    model = tiny.build(family)
    ids = tiny.tokens(1, 8)
    results = [dense(model, ids)] + [reference.logits(model, ids, 2, *strategies) for strategies in DROPS.values()]
    for i, one in enumerate(results):
        for other in results[:i]:
            assert gap(one, other) > 1e-2


@pytest.mark.parametrize("family", tiny.SUPPORTED)
def test_every_single_drop_shows(family: str) -> None:
    model = tiny.build(family)
    ids = tiny.tokens(1, 6)
    expected = reference.logits(model, ids, 2, KEEP)
    for block in range(BLOCKS):
        for strategy in ("block_drop", "plain_drop"):
            attention = [strategy if i == block else "keep_sync" for i in range(BLOCKS)]
            assert gap(reference.logits(model, ids, 2, attention), expected) > 1e-2
    for block in range(BLOCKS - 1):
        mlp = ["block_drop" if i == block else "keep_sync" for i in range(BLOCKS)]
        assert gap(reference.logits(model, ids, 2, KEEP, mlp), expected) > 1e-2


@pytest.mark.parametrize("family", tiny.SUPPORTED)
def test_every_bias_counts(family: str) -> None:
    model = tiny.build(family)
    ids = tiny.tokens(1, 6)
    attention, mlp = DROPS["mixture"]
    before = reference.logits(model, ids, 2, attention, mlp)
    biases = [(name, parameter) for name, parameter in model.named_parameters() if name.endswith("bias")]
    for name, parameter in biases:
        without_rotary = family == "opt" or (family == "smollm3" and name.split(".")[2] in "13")
        if "k_proj" in name and without_rotary:
            continue  # the same for every key a query sees, up to the softmax, which does not notice
        assert parameter.abs().min() > 0, name
        with torch.no_grad():
            parameter.neg_()
        assert gap(reference.logits(model, ids, 2, attention, mlp), before) > 1e-3, name
        with torch.no_grad():
            parameter.neg_()


def test_the_last_mlp_cannot_be_deferred() -> None:
    with pytest.raises(AssertionError, match="settle"):
        reference.logits(tiny.build("llama"), tiny.tokens(1, 4), 2, KEEP, ["block_drop"] * BLOCKS)


class ByHand:
    """A llama_bias model at TP 4 whose parts can be put together by hand: `b_o` and `b_d` a block's biases."""

    def __init__(self, blocks: int) -> None:
        self.model = tiny.build("llama_bias", layers=blocks)
        self.ids = tiny.tokens(1, 7)
        self.weights = {name: tensor.double() for name, tensor in self.model.state_dict().items()}
        self.parts = [
            {name.removeprefix(f"model.layers.{b}."): w for name, w in self.weights.items() if f".layers.{b}." in name}
            for b in range(blocks)
        ]
        self.b_o = [part["self_attn.o_proj.bias"] for part in self.parts]
        self.b_d = [part["mlp.down_proj.bias"] for part in self.parts]
        self.x = self.weights["model.embed_tokens.weight"][self.ids[0]]

    def attn(self, block: int, rank: int, x: torch.Tensor) -> torch.Tensor:
        """attn_i(n1(x))"""
        normed = reference._norm(self.parts[block], self.model.config, "input_layernorm", x)
        return reference._attention(self.parts[block], self.model.config, block, rank, 4, [normed] * 4)

    def mlp(self, block: int, rank: int, h: torch.Tensor) -> torch.Tensor:
        """mlp_i(n2(h))"""
        normed = reference._norm(self.parts[block], self.model.config, "post_attention_layernorm", h)
        return reference._mlp(self.parts[block], self.model.config, rank, 4, normed)

    def check(self, y: list[torch.Tensor], strategies: list[str], mlp_strategies: list[str] | None = None) -> None:
        """The reference's logits are the last norm and head of the streams `y`, each its part of the vocabulary."""
        got = reference.logits(self.model, self.ids, 4, strategies, mlp_strategies)[0]
        for rank, (first, last) in enumerate([(0, 33), (33, 66), (66, 99), (99, 131)]):
            normed = reference._norm(self.weights, self.model.config, "model.norm", y[rank])
            assert gap(got[:, first:last], normed @ self.weights["lm_head.weight"][first:last].T) < 1e-12


def total(partials: list[torch.Tensor]) -> torch.Tensor:
    """AR."""
    return torch.stack(partials).sum(0)


def test_block_drop_is_the_papers_block() -> None:
    m = ByHand(1)
    a = [m.attn(0, i, m.x) for i in range(4)]
    mlp = [m.mlp(0, i, m.x + a[i] + m.b_o[0]) for i in range(4)]
    m.check([m.x + total(a) + total(mlp) + m.b_o[0] + m.b_d[0]] * 4, ["block_drop"])


def test_plain_drop_leaves_a_stream_a_rank() -> None:
    m = ByHand(1)
    h = [m.x + m.attn(0, i, m.x) + m.b_o[0] for i in range(4)]
    mlp = total([m.mlp(0, i, h[i]) for i in range(4)])
    m.check([h[i] + mlp + m.b_d[0] for i in range(4)], ["plain_drop"])


def test_block_drop_after_plain_drop_leaves_what_was_written_off_alone() -> None:
    m = ByHand(2)
    w = [m.attn(0, i, m.x) for i in range(4)]
    x = m.x + m.b_o[0] + total([m.mlp(0, i, m.x + w[i] + m.b_o[0]) for i in range(4)]) + m.b_d[0]
    a = [m.attn(1, i, x + w[i]) for i in range(4)]
    mlp = [m.mlp(1, i, x + w[i] + a[i] + m.b_o[1]) for i in range(4)]
    y = x + total(a) + total(mlp) + m.b_o[1] + m.b_d[1]
    m.check([y + w[i] for i in range(4)], ["plain_drop", "block_drop"])


def test_a_deferred_mlp_is_settled_at_the_next_sync_point_that_is_kept() -> None:
    m = ByHand(2)
    h = m.x + total([m.attn(0, i, m.x) for i in range(4)]) + m.b_o[0]
    p = [m.mlp(0, i, h) for i in range(4)]
    x = h + m.b_d[0]
    a = [m.attn(1, i, x + p[i]) for i in range(4)]

    settled = x + total(p) + total(a) + m.b_o[1]  # by the next attention
    y = settled + total([m.mlp(1, i, settled) for i in range(4)]) + m.b_d[1]
    m.check([y] * 4, ["keep_sync", "keep_sync"], ["block_drop", "keep_sync"])

    x = x + m.b_o[1]  # by the next MLP, the attention's partial along with it
    y = x + total(p) + total(a) + total([m.mlp(1, i, x + p[i] + a[i]) for i in range(4)]) + m.b_d[1]
    m.check([y] * 4, ["keep_sync", "block_drop"], ["block_drop", "keep_sync"])


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_generate_is_greedy(family: str) -> None:
    model = tiny.build(family)
    ids, mask = tiny.left_padded(tiny.tokens(2, 6), pads=(0, 3))
    model.generation_config.eos_token_id = None
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)  # type: ignore[operator]
    assert torch.equal(reference.generate(model, ids, 2, KEEP, 5, attention_mask=mask), expected)
    row = reference.generate(model, ids[1:, 3:], 2, DROPS["mixture"][0], 5, DROPS["mixture"][1])
    both = reference.generate(model, ids, 2, DROPS["mixture"][0], 5, DROPS["mixture"][1], mask)
    assert torch.equal(both[1:, 3:], row)


@pytest.mark.parametrize("name", tiny.REFUSED)
def test_what_is_to_be_refused_runs_all_the_same(name: str) -> None:
    """So that its refusal is the tool's own, not a crash in building it."""
    with torch.no_grad():
        assert tiny.build_refused(name)(tiny.tokens(1, 6)).logits.isfinite().all()


@pytest.mark.parametrize("family", tiny.SUPPORTED)
def test_a_saved_folder_loads(family: str, tmp_path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = tiny.build(family)
    texts = tiny.stories(3, tiny.WORDS, seed=1)
    for bos in (True, False):
        tiny.save(model, tmp_path, tiny.WORDS, bos=bos)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        encoded = [tokenizer(text).input_ids for text in texts]
        assert all((ids[0] == tokenizer.bos_token_id) == bos for ids in encoded)
        assert not any(tokenizer.unk_token_id in ids for ids in encoded)
        assert [tokenizer.decode(ids, skip_special_tokens=True) for ids in encoded] == texts
    ids = tiny.tokens(1, 6)
    assert gap(dense(AutoModelForCausalLM.from_pretrained(tmp_path), ids), dense(model, ids)) == 0
