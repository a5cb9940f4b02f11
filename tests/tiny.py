"""Tiny random models, tokenizers and texts that the tests are run on.

Nothing here is downloaded, and nothing knows `spd_calib`. The weights are drawn by hand rather than left at
transformers' initialisation, which is too quiet to test with: its biases are zero, its norms all ones, and its
sub-layers add next to nothing to the residual stream, so that a dropped sync point would hardly show.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")
_WORDS = """
    a and the in on at to from with under behind near he she it they was had saw put took gave found lost kept
    held ran sat went came said old new red blue green small big cold warm dark bright one two three four five ball
    box cup key book lamp hat coat stone shell boat bird cat dog horse fox bear mouse fish tree river hill house
    garden kitchen school market road bridge field tower door window table chair shelf basket day night morning
    winter summer rain snow wind sun moon star anna ben clara david ella felix grace hugo iris jonas . , ? :
"""
WORDS = tuple(_WORDS.split())

SHAPE = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""The shape all models share. The vocabulary is divided by no TP degree; TP 4 and 8 have more ranks than KV heads."""

ALIASES = {
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "vocab": "vocab_size",
    "positions": "max_position_embeddings",
}
"""Short names for the arguments of `build`, the same for all families."""

_DELTA = {
    "head_dim": 16,
    "full_attention_interval": 2,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "rms_norm_eps": 1e-2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}
"""Gated DeltaNet in every second block. Its norms, of a single head, enlarge rounding unless their epsilon is large."""

FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {}),
    "llama_bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral_window": ("mistral", {"sliding_window": 5}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
    "gemma": ("gemma", {"head_dim": 16}),
    "opt": ("opt", {"do_layer_norm_before": True}),
    "starcoder2": ("starcoder2", {}),
    "arcee": ("arcee", {}),
    "ministral3": (
        "ministral3",
        {
            "head_dim": 8,
            "rope_parameters": {  # queries grow with their position, here from the fourth on
                "rope_type": "default",
                "rope_theta": 10000.0,
                "llama_4_scaling_beta": 0.3,
                "original_max_position_embeddings": 4,
            },
        },
    ),
    "smollm3": (
        "smollm3",  # blocks 1 and 3 without rotary positions, and with a window
        {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 5, "attention_bias": True},
    ),
    "seed_oss": ("seed_oss", {"head_dim": 8, "attention_out_bias": True, "mlp_bias": True}),
    "ernie4_5": ("ernie4_5", {"head_dim": 8, "use_bias": True}),
    "hunyuan": ("hunyuan_v1_dense", {"head_dim": 8}),
    "apertus": ("apertus", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    "nemotron": ("nemotron", {"attention_bias": True, "mlp_bias": True}),
    "stablelm": ("stablelm", {"use_qkv_bias": True}),
    "granite": (
        "granite",
        {
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.3,
            "embedding_multiplier": 2.0,
            "logits_scaling": 0.5,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "hyperclovax": (
        "hyperclovax",
        {"use_post_norm": False, "residual_multiplier": 0.4, "attention_multiplier": 0.3, "embedding_multiplier": 2.0},
    ),
    "gemma2": (
        "gemma2",  # blocks 0 and 2 with a window; scores and logits are capped where it shows
        {
            "head_dim": 8,
            "query_pre_attn_scalar": 12,
            "sliding_window": 5,
            "attention_bias": True,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma4": (  # blocks 1 and 3 see all tokens, with wider heads, fewer KV heads, and keys as values
        "gemma4_text",
        {
            "kv_heads": 4,
            "head_dim": 8,
            "global_head_dim": 16,
            "num_global_key_value_heads": 2,
            "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 0,
            "layer_types": 2 * ["sliding_attention", "full_attention"],
            "sliding_window": 5,
            "use_bidirectional_attention": "vision",
            "rms_norm_eps": 1e-2,  # norms of a single head enlarge rounding unless their epsilon is large
            "final_logit_softcapping": 5.0,
            "tie_word_embeddings": False,
        },
    ),
    "gemma3": (
        "gemma3_text",  # block 2 without a window, and with another rotary base
        {
            "head_dim": 8,
            "query_pre_attn_scalar": 12,
            "sliding_window": 5,
            "sliding_window_pattern": 3,
        },
    ),
    "glm4": ("glm4", {"head_dim": 8, "attention_bias": True}),
    "exaone4": (
        "exaone4",  # block 2 without a window and without rotary positions
        {
            "sliding_window": 5,
            "sliding_window_pattern": 3,
        },
    ),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"sliding_window": 5}),  # every fourth block without a window
    "phi3": ("phi3", {"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    "glm": ("glm", {"head_dim": 8, "attention_bias": True}),
    "minicpm3": (  # latent attention; branches, embeddings and logits are scaled
        "minicpm3",
        {
            "kv_heads": 8,
            "q_lora_rank": 24,
            "kv_lora_rank": 20,
            "qk_nope_head_dim": 6,
            "qk_rope_head_dim": 4,
            "scale_emb": 2.0,
            "dim_model_base": 32,
        },
    ),
    "qwen3_5": ("qwen3_5_text", _DELTA),  # blocks 0 and 2 with a linear attention
    "cwm": (
        "cwm",  # block 0 sees everything, the others a window
        {"head_dim": 8, "sliding_window": 5, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
}
"""Family -> (model type of transformers, what its configuration has besides SHAPE)."""

NORMS_AND_SCALE = {"use_post_norm": True, "attention_bias": True, "mlp_bias": True}
"""What makes `hyperclovax` one whose branches go through a norm, and then times a number."""

SUPPORTED: tuple[str, ...] = tuple(FAMILIES)

_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

_DEEPSEEK = {
    "kv_heads": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}

MIXTURES: dict[str, tuple[str, dict]] = {
    "mixtral": ("mixtral", {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 64}),
    "qwen2_moe": (  # a shared expert behind a gate; block 1 is dense
        "qwen2_moe",
        {**_EXPERTS, "shared_expert_intermediate_size": 48, "mlp_only_layers": [1], "norm_topk_prob": False},
    ),
    "qwen3_moe": ("qwen3_moe", {**_EXPERTS, "head_dim": 8, "norm_topk_prob": True}),
    "olmoe": ("olmoe", {"num_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 64, "norm_topk_prob": False}),
    "ernie4_5_moe": (  # block 0 is dense
        "ernie4_5_moe",
        {
            "moe_num_experts": 6,
            "moe_k": 2,
            "moe_intermediate_size": 32,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
            "head_dim": 8,
        },
    ),
    "granitemoe": (
        "granitemoe",
        {
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "intermediate_size": 64,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.3,
            "embedding_multiplier": 2.0,
            "logits_scaling": 0.5,
        },
    ),
    "glm4_moe": (  # block 0 is dense; experts in groups
        "glm4_moe",
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "n_shared_experts": 1,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 1.5,
            "norm_topk_prob": True,
            "head_dim": 8,
        },
    ),
    "gpt_oss": (  # blocks 0 and 2 with a window; experts with biases, clamped where it shows
        "gpt_oss",
        {
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "intermediate_size": 32,
            "head_dim": 8,
            "sliding_window": 5,
            "swiglu_limit": 0.5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "qwen3_5_moe": ("qwen3_5_moe_text", {**_DELTA, **_EXPERTS, "shared_expert_intermediate_size": 48}),
    "qwen3_next": (
        "qwen3_next",
        {**_DELTA, **_EXPERTS, "shared_expert_intermediate_size": 48, "mlp_only_layers": [1]},
    ),  # block 1 is dense
    "deepseek_v3": (  # block 0 is dense; latent queries, keys and values; experts in groups
        "deepseek_v3",
        {**_DEEPSEEK, "q_lora_rank": 24, "n_group": 4, "topk_group": 2, "norm_topk_prob": True, "attention_bias": True},
    ),
    "deepseek_v2": (  # block 0 is dense; plain queries
        "deepseek_v2",
        {**_DEEPSEEK, "q_lora_rank": None, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    ),
}
"""Mixtures of experts: family -> as in FAMILIES. No part of SUPPORTED: their streams may not differ for good."""

_REFUSED: dict[str, tuple[str, dict, tuple[str, ...]]] = {
    "hyperclovax_logits": ("hyperclovax", {"use_post_norm": False, "logits_scaling": 3.0}, ("differs",)),
    "gemma3_embedding": ("gemma3_text", {"head_dim": 8, "use_bidirectional_attention": True}, ("follows",)),
    "gemma4_inputs": ("gemma4_text", {"head_dim": 8, "hidden_size_per_layer_input": 8}, ("per_layer_input_norm",)),
    "gemma4_shared": (
        "gemma4_text",
        {
            "head_dim": 8,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 2,
            "layer_types": 2 * ["sliding_attention", "full_attention"],
        },
        ("keys and values of earlier",),
    ),
    "deepseek_v32": (
        "deepseek_v32",
        {"kv_heads": 8, "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 2},
        ("indexer", "all heads share"),
    ),
    "diffllama": ("diffllama", {"kv_heads": 4}, ("lambda_q1", "all heads share")),
    "falcon_mamba": ("falcon_mamba", {}, ("no plain attention",)),
    "gpt_neox_sequential": ("gpt_neox", {"use_parallel_residual": False}, ("fused",)),
    "opt_350m": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}, ("post-norm",)),
    "stablelm_norms": ("stablelm", {"qk_layernorm": True}, ("layernorm.norms", "all heads share")),
    "granite_swa": ("granite_swa", {"sliding_window": 5}, ("sinks", "all heads share")),
    "gpt_neox": ("gpt_neox", {"use_parallel_residual": True}, ("parallel",)),
    "gptj": ("gptj", {"rotary_dim": 4}, ("parallel",)),
    "phi": ("phi", {}, ("parallel",)),
    "cohere": ("cohere", {"logit_scale": 1.0}, ("parallel",)),
    "llama4": (
        "llama4_text",
        {"num_local_experts": 4, "head_dim": 8, "attn_temperature_tuning": False, "intermediate_size_mlp": 64},
        ("mixture of experts", "lie otherwise"),
    ),
}

REFUSED: dict[str, tuple[str, ...]] = {name: words for name, (_, _, words) in _REFUSED.items()}
"""Architecture -> words that the sentence refusing it has to contain (case aside)."""


def build(family: str, *, seed: int = 0, **overrides) -> PreTrainedModel:
    """A tiny random model of one of SUPPORTED or MIXTURES, float32, in eval mode.

    `overrides` by ALIASES or configuration names.
    """
    model_type, extra = {**FAMILIES, **MIXTURES}[family]
    return _model(_config(model_type, {**extra, **overrides}), seed)


def build_refused(name: str, *, seed: int = 0, **overrides) -> PreTrainedModel:
    """A tiny random model of an architecture that the tool must refuse, see REFUSED."""
    model_type, extra, _ = _REFUSED[name]
    return _model(_config(model_type, {**extra, **overrides}), seed)


def save(model: PreTrainedModel, directory: str | Path, words: Sequence[str] = WORDS, *, bos: bool = True) -> Path:
    """Save the model with a word-level tokenizer, so that transformers' Auto classes load the folder.

    `bos` says whether the tokenizer opens every text with `<bos>`. Qwen2 alone gets a tokenizer of single characters:
    transformers gives a folder of that model type its own byte-level tokenizer class, whatever was saved.
    """
    directory = Path(directory)
    model.save_pretrained(directory)
    make = character_tokenizer if model.config.model_type == "qwen2" else tokenizer
    make(words, bos=bos, vocab=model.config.vocab_size).save_pretrained(directory)
    return directory


def tokenizer(words: Sequence[str] = WORDS, *, bos: bool = True, vocab: int | None = None) -> PreTrainedTokenizerFast:
    """One token a word, the special tokens first; what is not among the words is `<unk>`."""
    entries = [*SPECIALS, *words]
    inner = Tokenizer(models.WordLevel({entry: i for i, entry in enumerate(entries)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return _wrap(inner, bos, vocab)


def character_tokenizer(
    words: Sequence[str] = WORDS, *, bos: bool = True, vocab: int | None = None
) -> PreTrainedTokenizerFast:
    """One token a printable ASCII character, spelled as byte-level tokenizers do; `words` make no difference."""
    spelled = [chr(i) for i in range(33, 127)] + ["\u0120", "\u010a"]  # the last two: a space, a newline
    entries = {entry: i for i, entry in enumerate([*SPECIALS, *spelled])}
    inner = Tokenizer(models.BPE(entries, merges=[], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return _wrap(inner, bos, vocab)


def _wrap(inner: Tokenizer, bos: bool, vocab: int | None) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers wants it: special tokens named, padding on the left."""
    if vocab is not None and inner.get_vocab_size() > vocab:
        raise ValueError(f"{inner.get_vocab_size()} tokens do not fit a vocabulary of {vocab}")
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", SPECIALS.index("<bos>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def stories(n: int, words: Sequence[str] = WORDS, seed: int = 0, *, shortest: int = 32, longest: int = 48) -> list[str]:
    """n texts of `shortest` to `longest` random words, a token each: <bos> comes on top where there is one."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(words, k=rng.randint(shortest, longest))) for _ in range(n)]


def write_jsonl(path: str | Path, texts: Sequence[str]) -> Path:
    """One JSON object a line, the text under the key `text`."""
    path = Path(path)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def tokens(batch: int, length: int, *, vocab: int = SHAPE["vocab_size"], seed: int = 0) -> torch.Tensor:
    """Random token ids, [batch, length], special tokens left out."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(SPECIALS), vocab, (batch, length), generator=generator)


def left_padded(ids: torch.Tensor, pads: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The same ids with the first `pads[b]` tokens of row b turned into padding, and the attention mask."""
    ids, mask = ids.clone(), torch.ones_like(ids)
    for row, pad in enumerate(pads):
        ids[row, :pad] = SPECIALS.index("<pad>")
        mask[row, :pad] = 0
    return ids, mask


def _config(model_type: str, extra: dict) -> PreTrainedConfig:
    """SHAPE and `extra` as a configuration, under the names that this model type has for them."""
    settings = {**SHAPE, **{ALIASES.get(key, key): value for key, value in extra.items()}}
    if "layer_types" in settings:
        settings["layer_types"] = settings["layer_types"][: settings["num_hidden_layers"]]
    if model_type == "opt":
        settings["ffn_dim"] = settings.pop("intermediate_size")
    if model_type == "gptj":
        settings["n_inner"] = settings.pop("intermediate_size")
    if model_type in ("opt", "gpt_neox", "gptj", "phi"):
        settings.pop("num_key_value_heads")  # every query head has its own
    return AutoConfig.for_model(model_type, **settings)


def _model(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """A model with weights that all matter: see the module's docstring.

    Livelier than this, the blocks enlarge float32's rounding until it passes 1e-5 in the logits (here: 5e-6 at most).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # some of what transformers draws stays, such as GPT-OSS's sinks
        # PyTorch's own attention leaves a soft cap out without a word
        how = {} if getattr(config, "attn_logit_softcapping", None) is None else {"attn_implementation": "eager"}
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **how)
    generator = torch.Generator().manual_seed(seed)
    norms_add_one = config.model_type == "nemotron"  # and transformers draws them as if they did not
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith(("bias", "A_log")) or (norms_add_one and parameter.dim() == 1):
                parameter.copy_(0.2 * noise)
            elif parameter.dim() == 1:  # a norm's weight: centred on one, in Gemma on zero
                parameter.add_(0.2 * noise)
            elif "embed" in name or "wte" in name or "lm_head" in name:
                parameter.copy_(0.12 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.copy_(1 + 0.2 * torch.randn(buffer.shape, generator=generator))
            if name.endswith("correction_bias"):  # of a router; transformers leaves it at zero
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
    return model.eval()
