"""Make the embedded default: python recipes/demo_model/train.py

Generates the story world, fits a tokenizer to it, trains a small Llama on fresh stories from random weights,
scores it on the three tasks through lm-eval, and writes what the package ships into `spd_calib/demo/` and the log, the
configuration and the scores into `results/demo/training/`. Everything is seeded. No story is seen twice, and
none that is trained on is shipped as calibration text, held-out text or task.
"""

import json
import math
import platform
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import lm_eval
import tokenizers
import torch
import transformers
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from tokenizers import decoders as token_decoders
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent))
import tasks
import world

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "spd_calib" / "demo"
RESULTS = ROOT / "results" / "demo" / "training"


@dataclass(frozen=True)
class Config:
    seed: int = 2502
    threads: int = 1
    # the model
    hidden: int = 96
    blocks: int = 8
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 16
    intermediate: int = 192
    positions: int = 256
    initial_std: float = 0.04
    # the text
    tokenizer_stories: int = 2000
    calibration_stories: int = 400
    heldout_stories: int = 200
    # the training
    echo_steps: int = 120  # up to here: short stories told twice
    drill_steps: int = 700  # up to here: drills
    steps: int = 1300
    batch: int = 36
    other_weight: float = 0.15  # of a word that is neither an answer nor told again, in the loss
    matrix_rate: float = 1e-2  # Muon's
    other_rate: float = 3e-3  # AdamW's
    final_share: float = 0.01  # of both, at the end
    warmup: int = 20
    constant_share: float = 0.5  # of the steps, before the rate falls
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    log_every: int = 25
    watch_every: int = 50


def make_tokenizer(config: Config) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE fitted to stories of its own split."""
    stories = texts("tokenizer", config.tokenizer_stories)
    # more than a closed vocabulary needs: every word becomes one token
    return byte_level_bpe(stories, vocabulary=1024, positions=config.positions)


def byte_level_bpe(corpus: list[str], *, vocabulary: int, positions: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE fitted to texts; like Llama's it puts <s> in front of every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = token_decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=positions,
    )


def make_model(config: Config, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=-(-len(tokenizer) // 8) * 8,
            hidden_size=config.hidden,
            intermediate_size=config.intermediate,
            num_hidden_layers=config.blocks,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.positions,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            initializer_range=config.initial_std,
        )
    )


def texts(split: str, count: int, start: int = 0) -> list[str]:
    return [world.story(split, number).text for number in range(start, start + count)]


def size_of(step: int, config: Config) -> world.Size:
    if step < config.echo_steps:
        return world.SHORT
    return world.DRILL if step < config.drill_steps else world.FULL


def batch_of(step: int, config: Config, tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the step's stories as token ids, and the weight of each token in the loss: both [batch, longest].

    Short stories told twice come first: from repetition looking back is learnt soonest. What weighs in the loss is
    what the story decides and the dice do not: all that is told again, and later the answers to the questions.
    """
    first, echo = step * config.batch, step < config.echo_steps
    stories = [world.story("train", n, size_of(step, config)) for n in range(first, first + config.batch)]
    rows, weights = [], []
    for story in stories:
        text = f"{story.text} {story.text}" if echo else story.text
        coded = tokenizer(text, return_offsets_mapping=True)
        answers = {len(f"{q.before} {q.stem}") for q in story.questions}
        weighs = [
            end > len(story.text) if echo else any(p in answers for p in range(start, end))
            for start, end in coded["offset_mapping"]
        ]
        rows.append(torch.tensor([*coded["input_ids"], tokenizer.eos_token_id]))
        weights.append(torch.tensor([1.0 if w else config.other_weight for w in [*weighs, False]]))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(rows, True, tokenizer.pad_token_id), pad(weights, True, 0.0)


def encode(tokenizer: PreTrainedTokenizerFast, stories: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and labels, one story a row, <s> in front and </s> behind, padded on the right, unlabelled there."""
    rows = [torch.tensor([*ids, tokenizer.eos_token_id]) for ids in tokenizer(stories)["input_ids"]]
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(rows, True, tokenizer.pad_token_id), pad(rows, True, -100)


def weighted_loss(model: LlamaForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the mean next-token loss, each token with its weight."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()


def rate_share(step: int, config: Config) -> float:
    """Return the share of the learning rate at a step: linear warm-up, constant, then a cosine to the final share."""
    constant = config.constant_share * config.steps
    if step < constant:
        return min(1.0, (step + 1) / config.warmup)
    progress = (step - constant) / (config.steps - constant)
    return config.final_share + (1 - config.final_share) * (1 + math.cos(math.pi * progress)) / 2


@torch.no_grad()
def watch(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """Return the loss on held-out stories, and how often the likeliest next word answers their questions correctly."""
    stories = [world.story("watched", number) for number in range(96)]
    ids, labels = encode(tokenizer, [story.text for story in stories[:48]])
    seen = {"heldout_loss": round(model(input_ids=ids, labels=labels, use_cache=False).loss.item(), 5)}
    for kind in tasks.ANSWERS:
        asked = [q for story in stories for q in story.questions if q.kind == kind][:96]
        ids, _ = encode(tokenizer, [f"{q.before} {q.stem}{q.answer}" for q in asked])
        ends = (ids == tokenizer.eos_token_id).nonzero()[:, 1]
        rows = torch.arange(len(asked))
        guessed = model(input_ids=ids, use_cache=False).logits[rows, ends - 2].argmax(-1)
        seen[kind] = round((guessed == ids[rows, ends - 1]).float().mean().item(), 3)
    return seen


def make_optimizers(model: LlamaForCausalLM, config: Config) -> list[torch.optim.Optimizer]:
    """Return Muon for the blocks' matrices (far fewer steps than AdamW here), and AdamW for embedding and norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    known = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in known]
    muon = torch.optim.Muon(
        matrices, lr=config.matrix_rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, torch.optim.AdamW(others, lr=config.other_rate, betas=config.betas, weight_decay=0.0)]


def train(config: Config, log: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    torch.manual_seed(config.seed)
    tokenizer = make_tokenizer(config)
    model = make_model(config, tokenizer)
    optimizers = make_optimizers(model, config)
    started = time.time()
    with log.open("w", encoding="utf-8") as lines:
        for step in range(config.steps):
            rate = config.matrix_rate * rate_share(step, config)
            for optimizer, full in zip(optimizers, (config.matrix_rate, config.other_rate), strict=True):
                optimizer.param_groups[0]["lr"] = full * rate_share(step, config)
            ids, weights = batch_of(step, config, tokenizer)
            loss = weighted_loss(model, ids, weights)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            last = step == config.steps - 1
            if step % config.log_every == 0 or last:
                entry = {"step": step, "loss": round(loss.item(), 5), "lr": round(rate, 8)}
                if step % config.watch_every == 0 or last:
                    entry |= watch(model, tokenizer)
                entry["seconds"] = round(time.time() - started, 1)
                lines.write(json.dumps(entry) + "\n")
                lines.flush()
                print(entry, flush=True)
    return model.eval(), tokenizer


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_text(config: Config) -> None:
    """Write calibration text, held-out text and tasks, once it is sure that none of it is trained on."""
    calibration, heldout = texts("calibration", config.calibration_stories), texts("heldout", config.heldout_stories)
    documents = {kind: tasks.documents(kind) for kind in tasks.ANSWERS}
    shipped = [*calibration, *heldout]
    assert len(set(shipped)) == len(shipped), "a story is shipped twice"
    begun = tuple({doc["story"] for docs in documents.values() for doc in docs})
    openings = {text[:200] for text in [*shipped, *begun]}
    for number in range(config.steps * config.batch):
        size = size_of(number // config.batch, config)
        assert world.story("train", number, size).text[:200] not in openings, f"story {number} was trained on"
    for folder in ("data", "tasks"):
        (SHIPPED / folder).mkdir(parents=True, exist_ok=True)
    write_lines(SHIPPED / "data" / "calibration.jsonl", [{"text": text} for text in calibration])
    write_lines(SHIPPED / "data" / "heldout.jsonl", [{"text": text} for text in heldout])
    for kind, docs in documents.items():
        write_lines(SHIPPED / "tasks" / f"{kind}.jsonl", docs)


def score(model_dir: Path, tasks_dir: Path) -> dict[str, dict[str, float]]:
    """Return the tasks' accuracies as lm-eval itself gives them, for the model as it was written."""
    manager = TaskManager(include_path=str(tasks_dir), include_defaults=False)
    names = [f"spd_demo_{kind}" for kind in tasks.ANSWERS]
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model_dir), "dtype": "float32"},
        tasks=names,
        task_manager=manager,
        device="cpu",
        batch_size=16,
        bootstrap_iters=0,
    )["results"]
    return {name: {"acc": results[name]["acc,none"], "documents": tasks.DOCUMENTS} for name in names}


def ship(config: Config) -> dict:
    """Write text and tasks, score the model that `train` left, and write the summary."""
    write_text(config)
    model = LlamaForCausalLM.from_pretrained(SHIPPED / "model")
    log = [json.loads(line) for line in (RESULTS / "train_log.jsonl").read_text(encoding="utf-8").splitlines()]
    summary = {
        "command": "python recipes/demo_model/train.py",
        "config": asdict(config),
        "world_seed": world.SEED,
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_seconds": round(log[-1]["seconds"]),
        "last": log[-1],
        "tasks": score(SHIPPED / "model", SHIPPED / "tasks"),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "lm_eval": lm_eval.__version__,
        },
    }
    (RESULTS / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def main() -> None:
    """Train and ship the model; with --ship only what comes after the training, for a change of the tasks."""
    config = Config()
    random.seed(config.seed)
    torch.set_num_threads(config.threads)
    RESULTS.mkdir(parents=True, exist_ok=True)
    if "--ship" not in sys.argv:
        model, tokenizer = train(config, RESULTS / "train_log.jsonl")
        model.save_pretrained(SHIPPED / "model")
        tokenizer.save_pretrained(SHIPPED / "model")
    print(json.dumps(ship(config)["tasks"]))


if __name__ == "__main__":
    main()
