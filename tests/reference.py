"""A tensor-parallel decoder with dropped sync points, written out the long way: what the package is measured against.

It shares no code with the package and calls nothing of the model: it reads `state_dict()` and `config`, and computes in
float64, one sequence, one rank, one head, one query position at a time. What a rank reads is the sum of three things,
kept apart (section 2 of the design):

    x      the part of the residual stream that all ranks share
    w[i]   what rank i keeps for itself for good, written off by plain_drop
    p[i]   what rank i still owes the others, until the next sync point that is kept

Where a sub-layer's output goes through a norm before it is added, what a rank owes waits in `late`, one entry for each
sub-layer, until the next sync point that is kept; meanwhile the rank reads the norm of its own share for it.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import delta
import experts
import latent
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

ATTENTION_STRATEGIES = ("keep_sync", "block_drop", "plain_drop")
MLP_STRATEGIES = ("keep_sync", "block_drop")

LLAMA_NAMES = {
    "embedding": "model.embed_tokens",
    "block": "model.layers.{}.",
    "n1": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "n2": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "last_norm": "model.norm",
}
STARCODER2_NAMES = {**LLAMA_NAMES, "gate": None, "up": "mlp.c_fc", "down": "mlp.c_proj"}
ARCEE_NAMES = {**LLAMA_NAMES, "gate": None}
OPT_NAMES = {
    "embedding": "model.decoder.embed_tokens",
    "block": "model.decoder.layers.{}.",
    "n1": "self_attn_layer_norm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.out_proj",
    "n2": "final_layer_norm",
    "gate": None,
    "up": "fc1",
    "down": "fc2",
    "last_norm": "model.decoder.final_layer_norm",
}
SANDWICH_NAMES = {
    **LLAMA_NAMES,
    "behind_attention": "post_attention_layernorm",
    "n2": "pre_feedforward_layernorm",
    "behind_mlp": "post_feedforward_layernorm",
}
GLM4_NAMES = {**LLAMA_NAMES, "behind_attention": "post_self_attn_layernorm", "behind_mlp": "post_mlp_layernorm"}
POST_NORM_NAMES = {**SANDWICH_NAMES, "n1": None, "n2": None}
APERTUS_NAMES = {**ARCEE_NAMES, "n1": "attention_layernorm", "n2": "feedforward_layernorm"}
NAMES: dict[str, dict] = {
    "llama": LLAMA_NAMES,
    "mistral": LLAMA_NAMES,
    "qwen2": LLAMA_NAMES,
    "qwen3": LLAMA_NAMES,
    "gemma": LLAMA_NAMES,
    "opt": OPT_NAMES,
    "starcoder2": STARCODER2_NAMES,
    "arcee": ARCEE_NAMES,
    "ministral3": LLAMA_NAMES,
    "smollm3": LLAMA_NAMES,
    "seed_oss": LLAMA_NAMES,
    "ernie4_5": LLAMA_NAMES,
    "hunyuan_v1_dense": LLAMA_NAMES,
    "apertus": APERTUS_NAMES,
    "nemotron": ARCEE_NAMES,
    "stablelm": LLAMA_NAMES,
    "cwm": LLAMA_NAMES,
    "minicpm3": LLAMA_NAMES,
    "granite": LLAMA_NAMES,
    "hyperclovax": {**LLAMA_NAMES, "behind_attention": "post_norm1", "behind_mlp": "post_norm2"},
    "gemma2": SANDWICH_NAMES,
    "gemma3_text": SANDWICH_NAMES,
    "gemma4_text": SANDWICH_NAMES,
    "glm4": GLM4_NAMES,
    "exaone4": POST_NORM_NAMES,
    "olmo2": POST_NORM_NAMES,
    "olmo3": POST_NORM_NAMES,
    "olmoe": LLAMA_NAMES,
    "phi3": LLAMA_NAMES,
    "glm": LLAMA_NAMES,
    "mixtral": LLAMA_NAMES,
    "qwen2_moe": LLAMA_NAMES,
    "qwen3_moe": LLAMA_NAMES,
    "ernie4_5_moe": LLAMA_NAMES,
    "granitemoe": LLAMA_NAMES,
    "glm4_moe": LLAMA_NAMES,
    "gpt_oss": LLAMA_NAMES,
    "deepseek_v3": LLAMA_NAMES,
    "deepseek_v2": LLAMA_NAMES,
    "qwen3_5_text": LLAMA_NAMES,
    "qwen3_5_moe_text": LLAMA_NAMES,
    "qwen3_next": LLAMA_NAMES,
}
"""Model type -> what the parts are called in its state dict; `gate` is None where the MLP has no gate."""

GEMMA = ("gemma", "gemma2", "gemma3_text")
"""Model types whose norms multiply by one more than their weight, and that scale their embeddings."""

NORMED_BY_HEAD = ("qwen3", "qwen3_moe", "apertus", "gemma3_text", "gemma4_text", "exaone4", *delta.HYBRIDS)
"""Model types that norm each head's queries and keys, before these turn with their position."""

OVER_ALL_HEADS = ("olmo2", "olmo3", "olmoe")
"""Model types that norm queries and keys over all heads together."""

SCALED = ("granitemoe", "granite", "hyperclovax")
"""Model types that multiply what their sub-layers add, their embeddings, and the products of queries and keys."""

LAYER_NORM_EPS = {"opt": None, "starcoder2": "norm_epsilon", "nemotron": "norm_eps", "stablelm": "layer_norm_eps"}
"""Model type with LayerNorm -> the name of its epsilon; where it has none, 1e-5."""


def logits(
    model: PreTrainedModel,
    input_ids: Tensor,
    tp: int,
    strategies: Sequence[str],
    mlp_strategies: Sequence[str] | None = None,
    attention_mask: Tensor | None = None,
    routers: Mapping[int, tuple[Tensor, Tensor]] | None = None,
    bits: Mapping[tuple[int, str], int] | None = None,
    replicated: Mapping[int, Sequence[Sequence[int]]] | None = None,
    prefill: Mapping[tuple[int, str], tuple[str, int | None]] | None = None,
    prompt: int = 0,
) -> Tensor:
    """Logits [batch, length, vocabulary] in float64, one strategy a block; zero where `attention_mask` is 0.

    A row with padding is the same row without it: positions count from its first real token. `routers` are, by block,
    the matrix and the bias by which a router expects what a deferred attention will bring (experts.py). `bits` are, by
    block and "attention" or "mlp", those of a quantised sync. `replicated` are, by block, the KV groups of others that
    each rank computes, too, for what its MLP reads. With `prefill` the first `prompt` tokens are treated by that: the
    strategy and the bits by block and "attention" or "mlp", kept where nothing is said. No cache is needed for it: what
    a token leaves for those behind it depends on its own treatment alone.
    """
    config = model.config
    weights = {name: tensor.detach().double().cpu() for name, tensor in model.state_dict().items()}
    mlp_strategies = ["keep_sync"] * config.num_hidden_layers if mlp_strategies is None else mlp_strategies
    _check(config, tp, strategies, mlp_strategies)
    head = weights["lm_head.weight"]
    part = math.ceil(head.shape[0] / tp)  # of the vocabulary, a rank
    out = torch.zeros(*input_ids.shape, head.shape[0], dtype=torch.float64)
    for row in range(input_ids.shape[0]):
        real = [t for t in range(input_ids.shape[1]) if attention_mask is None or attention_mask[row, t] != 0]
        streams = _streams(
            weights,
            config,
            input_ids[row, real],
            tp,
            strategies,
            mlp_strategies,
            routers or {},
            bits or {},
            replicated or {},
            prefill,
            prompt,
        )
        for rank in range(tp):
            words = slice(rank * part, (rank + 1) * part)
            out[row, real, words] = streams[rank] @ head[words].T
    if config.model_type in ("granite", "granitemoe"):
        out = out / config.logits_scaling
    if config.model_type == "minicpm3":
        out = out * config.dim_model_base / config.hidden_size
    if getattr(config, "final_logit_softcapping", None) is not None:
        out = config.final_logit_softcapping * (out / config.final_logit_softcapping).tanh()
    return out


def generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    tp: int,
    strategies: Sequence[str],
    steps: int,
    mlp_strategies: Sequence[str] | None = None,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """`input_ids` and `steps` greedy tokens a row, everything computed anew for each; no token ends a row early."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    for _ in range(steps):
        chosen = logits(model, input_ids, tp, strategies, mlp_strategies, mask)[:, -1:].argmax(-1)
        input_ids = torch.cat([input_ids, chosen], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return input_ids


def _check(config: PreTrainedConfig, tp: int, strategies: Sequence[str], mlp_strategies: Sequence[str]) -> None:
    """A test that asks for something meaningless should fail here and not pass by luck."""
    blocks = config.num_hidden_layers
    assert len(strategies) == len(mlp_strategies) == blocks, "one strategy a block"
    assert set(strategies) <= set(ATTENTION_STRATEGIES) and set(mlp_strategies) <= set(MLP_STRATEGIES)
    assert mlp_strategies[blocks - 1] == "keep_sync", "nothing is left to settle the last block's debt"
    assert config.num_attention_heads % tp == 0 and _neurons(config) % tp == 0, "the TP degree does not divide"
    if config.model_type not in ("opt", "gemma3_text", "gemma4_text", "olmo3"):
        assert config.rope_parameters["rope_type"] == "default", "plain rotary only"


def _streams(
    weights: dict[str, Tensor],
    config: PreTrainedConfig,
    ids: Tensor,
    tp: int,
    strategies: Sequence[str],
    mlp_strategies: Sequence[str],
    routers: Mapping[int, tuple[Tensor, Tensor]],
    bits: Mapping[tuple[int, str], int],
    replicated: Mapping[int, Sequence[Sequence[int]]],
    prefill: Mapping[tuple[int, str], tuple[str, int | None]] | None,
    prompt: int,
) -> list[Tensor]:
    """The last norm's output for one sequence, [length, hidden], as each rank has it."""
    names = NAMES[config.model_type]
    x = _embed(weights, config, ids)
    w = [torch.zeros_like(x) for _ in range(tp)]
    p = [torch.zeros_like(x) for _ in range(tp)]
    late: list[Late] = []
    beside = [torch.zeros_like(x) for _ in range(tp)]  # what a rank's MLP reads of others' heads
    for block in range(config.num_hidden_layers):
        prefix = names["block"].format(block)
        part = {key[len(prefix) :]: value for key, value in weights.items() if key.startswith(prefix)}
        part = _taken_apart(part, config)
        shared_before = _norm(part, config, names["n1"], x) if experts.are_in(part) else x
        routed = None
        for norm, linear, behind, strategy in (
            ("n1", "o", "behind_attention", strategies[block]),
            ("n2", "down", "behind_mlp", mlp_strategies[block]),
        ):
            norm_behind = names[behind] if f"{names.get(behind)}.weight" in part else None
            added = part.get(names[linear] + ".bias", torch.zeros_like(x))
            if linear == "down" and experts.are_in(part):
                expected = torch.zeros_like(x)
                if block in routers:
                    slope, bias = routers[block]
                    expected = shared_before @ slope + bias
                routed = experts.choose(part, config, _norm(part, config, names["n2"], x + expected))
                added = experts.bias(part, x, routed)
            branch = _branch(part, config, added, norm_behind)
            shares, reads = [], []
            for rank in range(tp):
                read = x + w[rank] + p[rank] + beside[rank] + sum(through(known[rank]) for _, through, known in late)
                if names[norm] is not None:
                    read = _norm(part, config, names[norm], read)
                reads.append(read)
            for rank, read in enumerate(reads):
                if linear == "o" and "self_attn.kv_b_proj.weight" in part:
                    shares.append(latent.attention(part, config, rank, tp, read))
                elif linear == "o" and delta.is_in(part):
                    shares.append(delta.attention(part, config, rank, tp, read))
                elif linear == "o":
                    shares.append(_attention(part, config, block, rank, tp, reads))
                elif routed is not None:
                    shares.append(experts.partial(part, config, rank, tp, read, routed))
                else:
                    shares.append(_mlp(part, config, rank, tp, read))
            beside = [torch.zeros_like(x) for _ in range(tp)]
            if linear == "o" and block in replicated:
                assert strategy == "block_drop"
                beside = [
                    sum(_of_group(part, config, block, group, tp, read) for group in own)
                    for own, read in zip(replicated[block], reads, strict=True)
                ]
            point = (block, "attention" if linear == "o" else "mlp")
            now = (x, w, p, late, beside)
            x, w, p, late, beside = _behind(*now, shares, branch, bool(norm_behind), strategy, bits.get(point))
            if prefill is not None:  # the tokens of the prompt are treated otherwise
                of_prompt = _behind(*now, shares, branch, bool(norm_behind), *prefill.get(point, ("keep_sync", None)))
                assert not late and not of_prompt[3], "sums that wait behind norms: write it out here first"
                x = torch.cat([of_prompt[0][:prompt], x[prompt:]])
                w = [torch.cat([a[:prompt], b[prompt:]]) for a, b in zip(of_prompt[1], w, strict=True)]
                p = [torch.cat([a[:prompt], b[prompt:]]) for a, b in zip(of_prompt[2], p, strict=True)]
        if "layer_scalar" in part:
            times = part["layer_scalar"]
            x, w, p = x * times, [kept * times for kept in w], [owed * times for owed in p]
            late = [(owed, lambda total, was=was, times=times: times * was(total), known) for owed, was, known in late]
    assert not late
    return [_norm(weights, config, names["last_norm"], x + w[rank] + p[rank]) for rank in range(tp)]


def _behind(
    x: Tensor,
    w: list[Tensor],
    p: list[Tensor],
    late: list,
    beside: list[Tensor],
    shares: list[Tensor],
    branch: Callable,
    norm_behind: bool,
    strategy: str,
    bits: int | None,
) -> tuple:
    """x, w, p, late and beside behind a sync point that is treated so."""
    ranks = range(len(p))
    if strategy == "keep_sync" and bits is not None:
        x = _settled_with_bits(x, p, late, shares, branch, norm_behind, bits)
        p, late = [torch.zeros_like(x) for _ in p], []
    elif strategy == "keep_sync":
        x = x + sum(p)
        for owed, through, _ in late:
            x = x + through(sum(owed))
        x = x + branch(sum(shares))
        p, late = [torch.zeros_like(x) for _ in p], []
    elif strategy == "plain_drop" and norm_behind:
        w = [w[rank] + branch(shares[rank]) for rank in ranks]
    elif norm_behind:
        late = [*late, (shares, branch, [s + more for s, more in zip(shares, beside, strict=True)])]
        beside = [torch.zeros_like(x) for _ in ranks]
    else:  # what joins is linear in the shares: each rank adds its own, and all of them the bias
        b = branch(torch.zeros_like(x))
        mine = [branch(shares[rank]) - b for rank in ranks]
        beside = [branch(more) - b for more in beside]
        x = x + b
        if strategy == "plain_drop":
            w = [w[rank] + mine[rank] for rank in ranks]
        else:
            p = [p[rank] + mine[rank] for rank in ranks]
    return x, w, p, late, beside


def _settled_with_bits(
    x: Tensor, p: list[Tensor], late: list, shares: list[Tensor], branch: Callable, norm_behind: bool, bits: int
) -> Tensor:
    """The stream behind a quantised sync: what it settles lies side by side in each rank's message."""
    width, zero = x.shape[1], torch.zeros_like(x)
    if norm_behind:
        assert not any(owed.any() for owed in p), "a debt beside a norm: write it out here first"
        messages = [
            torch.cat([*(owed[rank] for owed, _, _ in late), share], dim=1) for rank, share in enumerate(shares)
        ]
        throughs = [*(through for _, through, _ in late), branch]
    else:
        b = branch(zero)
        messages = [p[rank] + branch(share) - b for rank, share in enumerate(shares)]
        throughs = [lambda total: total + b]
    total = quantised_sum(messages, bits)  # of so few tokens: in one shot
    for i, through in enumerate(throughs):
        x = x + through(total[:, i * width : (i + 1) * width])
    return x


def quantised_sum(messages: Sequence[Tensor], bits: int, *, twice: bool = False) -> Tensor:
    """The sum of the ranks' messages [length, width], each quantised; where it is sent on (`twice`), itself, too."""
    total = sum(_arrived(message, bits) for message in messages)
    return _arrived(total, bits) if twice else total


def _arrived(message: Tensor, bits: int) -> Tensor:
    """Every 64 values of a token as whole numbers of steps from zero, as many as have a code."""
    out = message.clone()
    for t in range(message.shape[0]):
        for start in range(0, message.shape[1], 64):
            values = message[t, start : start + 64].tolist()
            low, high = min(*values, 0.0), max(*values, 0.0)
            step = torch.tensor((high - low) / (2**bits - 1)).bfloat16().item()
            below = round(-low / step) if step else 0
            for i, value in enumerate(values):
                steps = round(value / step) if step else 0
                out[t, start + i] = step * min(max(steps, -below), 2**bits - 1 - below)
    return out


Late = tuple[list[Tensor], Callable[[Tensor], Tensor], list[Tensor]]
"""What every rank owes of one sub-layer, what the sum of it becomes before it is added, what the rank knows of it."""


def _branch(part: dict[str, Tensor], config: PreTrainedConfig, bias: Tensor, norm: str | None) -> Callable:
    """What a sub-layer's output, its bias left out, becomes before it is added: + bias, normed, scaled."""

    def through(out: Tensor) -> Tensor:
        out = out + bias
        if norm is not None:
            out = _norm(part, config, norm, out)
        if config.model_type == "minicpm3":
            return out * config.scale_depth / math.sqrt(config.num_hidden_layers)
        return out * config.residual_multiplier if config.model_type in SCALED else out

    return through


def _taken_apart(part: dict[str, Tensor], config: PreTrainedConfig) -> dict[str, Tensor]:
    """A block's weights under Llama's names where some are fused: q's rows, k's, then v's; the gate's, then up's."""
    part = dict(part)
    for name in list(part):
        if "qkv_proj" in name:
            sizes = [
                heads * _head_size(config) for heads in (config.num_attention_heads, *2 * [config.num_key_value_heads])
            ]
            for letter, rows in zip("qkv", part[name].split(sizes), strict=True):
                part[name.replace("qkv_proj", f"{letter}_proj")] = rows
        if "gate_up_proj" in name:
            half = len(part[name]) // 2
            part[name.replace("gate_up", "gate")], part[name.replace("gate_up", "up")] = (
                part[name][:half],
                part[name][half:],
            )
    return part


def _head_size(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _embed(weights: dict[str, Tensor], config: PreTrainedConfig, ids: Tensor) -> Tensor:
    """What enters the first block, [length, hidden]."""
    table = weights[NAMES[config.model_type]["embedding"] + ".weight"]
    x = torch.stack([table[int(i)] for i in ids])
    if config.model_type in (*GEMMA, "gemma4_text"):
        x = x * float(torch.tensor(config.hidden_size**0.5))  # rounded to float32, as transformers has it
    if config.model_type in SCALED:
        x = x * config.embedding_multiplier
    if config.model_type == "minicpm3":
        x = x * config.scale_emb
    if config.model_type == "opt":
        places = weights["model.decoder.embed_positions.weight"]
        x = x + torch.stack([places[t + 2] for t in range(len(ids))])  # OPT's first two rows are for nobody
    return x


def _norm(weights: dict[str, Tensor], config: PreTrainedConfig, name: str, x: Tensor) -> Tensor:
    """LayerNorm in the families of LAYER_NORM_EPS, else RMSNorm, over the last dimension."""
    weight = weights[name + ".weight"]
    if config.model_type in (*GEMMA, "nemotron", *delta.HYBRIDS):
        weight = 1 + weight
    if config.model_type in LAYER_NORM_EPS:
        eps = getattr(config, LAYER_NORM_EPS[config.model_type] or "", 1e-5)
        centred = x - x.mean(-1, keepdim=True)
        return centred / ((centred**2).mean(-1, keepdim=True) + eps).sqrt() * weight + weights[name + ".bias"]
    return x / ((x**2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weight


def _attention(
    part: dict[str, Tensor], config: PreTrainedConfig, block: int, rank: int, tp: int, reads: list[Tensor]
) -> Tensor:
    """The sum over the rank's own query heads of head times its columns of `o`; the bias of `o` is left out.

    `reads` is what every rank's attention reads: norms over all heads need the squares of the others' heads.
    """
    x = reads[rank]
    names = NAMES[config.model_type]
    heads = config.num_attention_heads
    own = config.per_layer_config[block] if config.model_type == "gemma4_text" else config
    kv_heads = heads if config.model_type == "opt" else own.num_key_value_heads
    if "self_attn.v_proj.weight" not in part and config.model_type == "gemma4_text":  # keys are values, too
        part = {**part, "self_attn.v_proj.weight": part["self_attn.k_proj.weight"]}
    size, q_rows = (part[names[n] + ".weight"].shape[d] // heads for n, d in (("o", 1), ("q", 0)))
    window = _window(config, block)
    total = torch.zeros_like(x)
    for head in range(rank * heads // tp, (rank + 1) * heads // tp):
        served_by = head // (heads // kv_heads)
        q = _rows(part, names["q"], x, head * q_rows, head * q_rows + size)
        k = _rows(part, names["k"], x, served_by * size, (served_by + 1) * size)
        v = _rows(part, names["v"], x, served_by * size, (served_by + 1) * size)
        if config.model_type in NORMED_BY_HEAD:
            q = _norm(part, config, "self_attn.q_norm", q)
            k = _norm(part, config, "self_attn.k_norm", k)
        if config.model_type == "gemma4_text":
            v = v / ((v**2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()
        if config.model_type in OVER_ALL_HEADS:
            q_square, k_square = _mean_squares(part, config, tp, reads)
            of_q = part["self_attn.q_norm.weight"][head * size : (head + 1) * size]
            of_k = part["self_attn.k_norm.weight"][served_by * size : (served_by + 1) * size]
            q = q / (q_square + config.rms_norm_eps).sqrt() * of_q
            k = k / (k_square + config.rms_norm_eps).sqrt() * of_k
        if _has_rotary(config, block):
            q, k = _rotate(q, config, block), _rotate(k, config, block)
        if config.model_type == "hunyuan_v1_dense":
            q = _norm(part, config, "self_attn.query_layernorm", q)
            k = _norm(part, config, "self_attn.key_layernorm", k)
        if config.model_type == "ministral3":
            every = config.rope_parameters["original_max_position_embeddings"]
            beta = config.rope_parameters["llama_4_scaling_beta"]
            q = torch.stack([(1 + beta * math.log(1 + t // every)) * q[t] for t in range(len(q))])
        seen = []
        for t in range(x.shape[0]):
            first = 0 if window is None else max(0, t + 1 - window)
            times = config.attention_multiplier if config.model_type in SCALED else 1 / math.sqrt(size)
            if config.model_type == "gemma4_text":
                times = 1.0
            if config.model_type in ("gemma2", "gemma3_text"):
                times = 1 / math.sqrt(config.query_pre_attn_scalar)
            scores = k[first : t + 1] @ q[t] * times
            if config.model_type == "gemma2" and config.attn_logit_softcapping is not None:
                scores = config.attn_logit_softcapping * (scores / config.attn_logit_softcapping).tanh()
            of_sink = 0.0
            if "self_attn.sinks" in part:  # a head may look at nothing
                of_sink = (part["self_attn.sinks"][head] - scores.max()).exp()
            shares = (scores - scores.max()).exp()
            seen.append((shares / (shares.sum() + of_sink)) @ v[first : t + 1])
        attended = torch.stack(seen)
        if q_rows > size:  # behind a head's query lies its gate
            gate = _rows(part, names["q"], x, head * q_rows + size, (head + 1) * q_rows)
            attended = attended * torch.sigmoid(gate)
        total = total + attended @ part[names["o"] + ".weight"][:, head * size : (head + 1) * size].T
    return total


def _of_group(
    part: dict[str, Tensor], config: PreTrainedConfig, block: int, group: int, tp: int, read: Tensor
) -> Tensor:
    """What a KV group makes of what a rank reads: of as many as there are KV heads, or ranks, if these are more."""
    if "self_attn.kv_b_proj.weight" in part:
        return latent.attention(part, config, group, config.num_attention_heads, read)
    heads = config.num_attention_heads
    groups = max(tp, heads if config.model_type == "opt" else config.num_key_value_heads)
    return _attention(part, config, block, group, groups, [read] * groups)


def _mean_squares(part: dict[str, Tensor], config: PreTrainedConfig, tp: int, reads: list[Tensor]) -> list[Tensor]:
    """The mean square over all heads' queries, and keys, [length, 1] each: every head from what its rank reads.

    Of a KV head that several ranks hold the mean of theirs.
    """
    found = []
    for letter, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
        whole = part[f"self_attn.{letter}_proj.weight"]
        size = len(whole) // heads
        total = torch.zeros(len(reads[0]), 1, dtype=torch.float64)
        for head in range(heads):
            holders = [head * tp // heads] if heads >= tp else range(head * tp // heads, (head + 1) * tp // heads)
            for rank in holders:
                own = reads[rank] @ whole[head * size : (head + 1) * size].T
                total += (own**2).sum(-1, keepdim=True) / len(holders)
        found.append(total / len(whole))
    return found


def _window(config: PreTrainedConfig, block: int) -> int | None:
    """How many tokens, itself included, a token of this block sees; None for all."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    return window if kinds is None or kinds[block] == "sliding_attention" else None


def _has_rotary(config: PreTrainedConfig, block: int) -> bool:
    """Whether queries and keys of this block turn with their position."""
    if config.model_type == "exaone4":
        return config.sliding_window is None or config.layer_types[block] == "sliding_attention"
    return config.model_type != "opt" and (config.model_type != "smollm3" or bool(config.no_rope_layers[block]))


def _rotate(x: Tensor, config: PreTrainedConfig, block: int) -> Tensor:
    """Rotary position embedding, x [length, head size]: pairs of entries turn by position / theta^(2j/size).

    Pairs are j and j + half, in some families 2j and 2j + 1; in some only the first entries of a head turn at all.
    """
    rope = config.rope_parameters
    if config.model_type in ("gemma3_text", "gemma4_text", "olmo3"):  # of its kind of block
        rope = rope[config.layer_types[block]]
    size = int(x.shape[1] * rope.get("partial_rotary_factor", 1.0))
    half = size // 2
    out, turning = x.clone(), half
    if rope["rope_type"] == "proportional":  # pairs as if all of the head turned, the first of which do
        size, half = x.shape[1], x.shape[1] // 2
    for j in range(turning):
        a, b = (2 * j, 2 * j + 1) if config.model_type in ("ernie4_5", "ernie4_5_moe", "glm", "glm4") else (j, j + half)
        angle = torch.arange(x.shape[0], dtype=torch.float64) * rope["rope_theta"] ** (-2 * j / size)
        out[:, a] = x[:, a] * angle.cos() - x[:, b] * angle.sin()
        out[:, b] = x[:, b] * angle.cos() + x[:, a] * angle.sin()
    return out


def _mlp(part: dict[str, Tensor], config: PreTrainedConfig, rank: int, tp: int, x: Tensor) -> Tensor:
    """The rank's neurons times their columns of `down`; the bias of `down` is left out."""
    names = NAMES[config.model_type]
    first, last = rank * _neurons(config) // tp, (rank + 1) * _neurons(config) // tp
    up = _rows(part, names["up"], x, first, last)
    if config.model_type == "apertus":
        neurons = _xielu(part, up)
    elif names["gate"] is None:
        neurons = _activation(config, up)
    else:
        neurons = _activation(config, _rows(part, names["gate"], x, first, last)) * up
    return neurons @ part[names["down"] + ".weight"][:, first:last].T


def _xielu(part: dict[str, Tensor], x: Tensor) -> Tensor:
    """Apertus's activation: its two curvatures are weights of the block."""
    alpha_p, alpha_n, beta, eps = (part[f"mlp.act_fn.{name}"] for name in ("alpha_p", "alpha_n", "beta", "eps"))
    right = (1 + alpha_p.exp()).log() * x**2 + beta * x
    left = (torch.minimum(x, eps).exp() - 1 - x) * (beta + (1 + alpha_n.exp()).log()) + beta * x
    return torch.where(x > 0, right, left)


def _neurons(config: PreTrainedConfig) -> int:
    """The width of the MLP."""
    return config.ffn_dim if config.model_type == "opt" else config.intermediate_size


def _activation(config: PreTrainedConfig, x: Tensor) -> Tensor:
    """The MLP's activation function, by the name the configuration has for it."""
    name = config.activation_function if config.model_type == "opt" else getattr(config, "hidden_act", None)
    name = config.hidden_activation if config.model_type in ("gemma2", "gemma3_text", "gemma4_text") else name
    if name == "silu":
        return x / (1 + (-x).exp())
    if name == "relu":
        return torch.where(x > 0, x, torch.zeros_like(x))
    if name == "relu2":
        return torch.where(x > 0, x**2, torch.zeros_like(x))
    if name == "gelu":
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2
    if name in ("gelu_pytorch_tanh", "gelu_new"):
        return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    raise NotImplementedError(name)


def _rows(part: dict[str, Tensor], name: str, x: Tensor, first: int, last: int) -> Tensor:
    """x through the output features first..last of a linear layer, with their biases where it has any."""
    out = x @ part[name + ".weight"][first:last].T
    return out + part[name + ".bias"][first:last] if name + ".bias" in part else out
