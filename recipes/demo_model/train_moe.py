"""Train a small mixture of experts to try docs/moe.md on:

    python recipes/demo_model/train_moe.py OUT --stories tinystories.jsonl

A Mixtral of 6 blocks, 8 experts of which each token takes 2, on the demo's story world (world.py) and on TinyStories
(one {"text": ...} a line; the last HELD documents are not trained on). The load of every block's router is balanced by
an auxiliary loss. Writes the model and its tokenizer to OUT, and the log, with what experts chosen at random cost the
trained model, to results/moe/training/. The model is not shipped. Everything is seeded.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent))
import train as demo

RESULTS = demo.ROOT / "results" / "moe" / "training"
HELD = 200  # documents at the end of the stories' file that are kept for measuring


@dataclass(frozen=True)
class Config(demo.Config):
    hidden: int = 64
    blocks: int = 6
    head_dim: int = 8
    experts: int = 8
    chosen: int = 2
    intermediate: int = 64  # of each expert
    vocabulary: int = 1024
    balance: float = 0.05  # weight of the auxiliary loss
    story_rows: int = 8  # of TinyStories in each batch
    story_tokens: int = 128
    echo_steps: int = 50
    drill_steps: int = 200
    steps: int = 520
    batch: int = 16
    watch_every: int = 65


def make_tokenizer(config: Config, stories: list[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE fitted to both texts."""
    corpus = [*demo.texts("tokenizer", config.tokenizer_stories), *stories]
    return demo.byte_level_bpe(corpus, vocabulary=config.vocabulary, positions=config.positions)


def make_model(config: Config, tokenizer: PreTrainedTokenizerFast) -> MixtralForCausalLM:
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=-(-len(tokenizer) // 8) * 8,
            hidden_size=config.hidden,
            intermediate_size=config.intermediate,
            num_hidden_layers=config.blocks,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_dim,
            num_local_experts=config.experts,
            num_experts_per_tok=config.chosen,
            max_position_embeddings=config.positions,
            sliding_window=None,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            initializer_range=config.initial_std,
        )
    )


class Optimizers:
    """Muon for the matrices of the blocks, each expert's by itself; AdamW for the embedding, norms and routers."""

    def __init__(self, model: MixtralForCausalLM, config: Config):
        in_blocks = [(n, p) for n, p in model.model.layers.named_parameters() if p.ndim > 1 and "gate.weight" not in n]
        known = {id(p) for _, p in in_blocks}
        self.experts = [(p, [torch.nn.Parameter(m) for m in p.data]) for _, p in in_blocks if p.ndim == 3]
        matrices = [p for _, p in in_blocks if p.ndim == 2] + [m for _, parts in self.experts for m in parts]
        others = [p for p in model.parameters() if id(p) not in known]
        self.each = [
            torch.optim.Muon(
                matrices, lr=config.matrix_rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(others, lr=config.other_rate, betas=config.betas, weight_decay=0.0),
        ]
        self.rates = (config.matrix_rate, config.other_rate)

    def step(self, share: float) -> None:
        """Make a step at this share of the full learning rates, and forget the gradients."""
        for stacked, parts in self.experts:
            for part, grad in zip(parts, stacked.grad, strict=True):
                part.grad = grad
            stacked.grad = None
        for optimizer, full in zip(self.each, self.rates, strict=True):
            optimizer.param_groups[0]["lr"] = full * share
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def story_batch(stories: torch.Tensor, rows: int, config: Config, generator: torch.Generator) -> torch.Tensor:
    """Return windows [rows, story_tokens] of TinyStories' token ids, drawn at random."""
    starts = torch.randint(len(stories) - config.story_tokens, (rows,), generator=generator)
    return torch.stack([stories[s : s + config.story_tokens] for s in starts.tolist()])


def loss_of(model: MixtralForCausalLM, ids: torch.Tensor, weights: torch.Tensor, balance: float) -> tuple:
    """Return the weighted next-token loss with the auxiliary loss added, and the former alone.

    The auxiliary loss is the Switch Transformer's, block by block: 1 where the load is even. (Transformers' own takes
    the mean over all blocks first, which lets an expert of one block idle for another's.)
    """
    out = model(input_ids=ids, use_cache=False, output_router_logits=True)
    losses = torch.nn.functional.cross_entropy(out.logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    loss = (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()
    uneven = torch.stack([_unevenness(logits) for logits in out.router_logits]).mean()
    return loss + balance * uneven, loss.item()


def _unevenness(logits: torch.Tensor) -> torch.Tensor:
    """Return experts * sum of (share of choices) * (mean probability) of one block, from router logits [N, experts]."""
    p, experts = logits.float().softmax(-1), logits.shape[-1]
    share = p.topk(Config.chosen)[1].flatten().bincount(minlength=experts) / (len(p) * Config.chosen)
    return experts * (share * p.mean(0)).sum()


@torch.no_grad()
def watch(model: MixtralForCausalLM, world_text: tuple, held: torch.Tensor) -> dict[str, float]:
    """Return the losses on text that is not trained on, and the least and the greatest load of an expert."""
    ids, labels = world_text
    out = model(input_ids=held, labels=held, use_cache=False)
    routers = model(input_ids=held, use_cache=False, output_router_logits=True).router_logits
    chosen = [logits.topk(Config.chosen)[1].flatten() for logits in routers]
    load = torch.stack([c.bincount(minlength=Config.experts) / len(c) for c in chosen])
    return {
        "world_loss": round(model(input_ids=ids, labels=labels, use_cache=False).loss.item(), 5),
        "tinystories_loss": round(out.loss.item(), 5),
        "least_load": round(load.min().item(), 4),
        "most_load": round(load.max().item(), 4),
    }


@torch.no_grad()
def cost_of_random_experts(model: MixtralForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Return the loss as it is, and where every router's choice is drawn at random, its weights staying."""
    generator = torch.Generator().manual_seed(0)

    def drawn(router: torch.nn.Module, args: tuple, output: tuple) -> tuple:
        logits, weights, chosen = output
        return logits, weights, torch.rand(logits.shape, generator=generator).topk(chosen.shape[-1])[1]

    as_it_is = model(input_ids=ids, labels=labels, use_cache=False).loss.item()
    hooks = [layer.mlp.gate.register_forward_hook(drawn) for layer in model.model.layers]
    at_random = model(input_ids=ids, labels=labels, use_cache=False).loss.item()
    for hook in hooks:
        hook.remove()
    return {"loss": as_it_is, "loss_random_experts": at_random, "cost": at_random - as_it_is}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--stories", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=Config.steps)
    args = parser.parse_args()
    config = replace(Config(), steps=args.steps)
    torch.manual_seed(config.seed)
    torch.set_num_threads(config.threads)
    documents = [json.loads(line)["text"] for line in args.stories.read_text(encoding="utf-8").splitlines()][:-HELD]
    tokenizer = make_tokenizer(config, documents)
    coded = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(documents)["input_ids"]]
    stories = torch.tensor([i for ids in coded[:-32] for i in ids])
    held = torch.tensor([i for ids in coded[-32:] for i in ids])[: 24 * config.story_tokens].view(24, -1)
    model = make_model(config, tokenizer)
    world_text = demo.encode(tokenizer, demo.texts("watched", 32))
    optimizers, generator = Optimizers(model, config), torch.Generator().manual_seed(config.seed)
    RESULTS.mkdir(parents=True, exist_ok=True)
    started, log = time.time(), []
    for step in range(config.steps):
        ids, weights = demo.batch_of(step, config, tokenizer)
        told = story_batch(stories, config.story_rows, config, generator)
        width = max(ids.shape[1], told.shape[1])
        pad = torch.nn.functional.pad
        ids, told = (pad(t, (0, width - t.shape[1]), value=tokenizer.pad_token_id) for t in (ids, told))
        weights = pad(weights, (0, width - weights.shape[1]))
        told_weights = (told != tokenizer.pad_token_id).float() * 0.5
        total, loss = loss_of(model, torch.cat([ids, told]), torch.cat([weights, told_weights]), config.balance)
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizers.step(demo.rate_share(step, config))
        if step % config.watch_every == 0 or step == config.steps - 1:
            entry = {"step": step, "loss": round(loss, 5)} | watch(model, world_text, held)
            entry["seconds"] = round(time.time() - started, 1)
            log.append(entry)
            print(entry, flush=True)
            model.save_pretrained(args.out)
            tokenizer.save_pretrained(args.out)
    model.eval()
    summary = {
        "command": "python recipes/demo_model/train_moe.py OUT --stories tinystories-calibration.jsonl",
        "config": asdict(config),
        "parameters": sum(p.numel() for p in model.parameters()),
        "threads": config.threads,
        "log": log,
        "random_experts": {
            "world": cost_of_random_experts(model, *world_text),
            "tinystories": cost_of_random_experts(model, held, held),
        },
        "versions": {"torch": torch.__version__},
    }
    (RESULTS / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(summary["random_experts"], flush=True)


if __name__ == "__main__":
    main()
