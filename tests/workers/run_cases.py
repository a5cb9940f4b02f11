"""What real ranks make of the tiny models: run by torchrun, read by test_distributed.py.

torchrun ... run_cases.py TP FOLDER     FOLDER holds a checkpoint a case; seen_TP.pt is left there
"""

import hashlib
import sys
from pathlib import Path

import tiny
import torch
import torch.distributed as dist
from distributed_cases import (
    ATTENTIONS,
    BOTH,
    DROP,
    KEEP,
    LONG,
    MIXED,
    MLP,
    NEW_TOKENS,
    PADS,
    QUANTISED,
    REPLICATING,
    SMALL_VOCABULARY,
    replicated,
    replicating,
)

from spd_calib.errors import InputError
from spd_calib.formats.drops import Drops
from spd_calib.parallel.ending import ending_together
from spd_calib.parallel.session import open_session
from spd_calib.ranks import is_main_rank


def everyone(value) -> list:
    """`value` of each rank."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def follow(lm) -> tuple[list, list]:
    """All-reduces of each forward, and a running digest of the rank's stream after each block, from now on."""
    counts: list[int] = []
    digests = [hashlib.sha256() for _ in lm.blocks]
    lm.model.register_forward_pre_hook(lambda *_: counts.append(-lm.comm.all_reduces))
    lm.model.register_forward_hook(lambda *_: counts.append(counts.pop() + lm.comm.all_reduces))
    for digest, block in zip(digests, lm.blocks, strict=True):
        block.register_forward_hook(digesting(digest))
    return counts, digests


def digesting(digest):
    """A hook that adds what the rank reads next; after a deferred MLP sync point the part that all ranks share."""

    def hook(module, args, s) -> None:
        stream = (s.read(0) if s.settled else s.shared).contiguous()
        digest.update(stream.view(torch.uint8).numpy())

    return hook


def family(folder: Path, tp: int) -> dict:
    lm = open_session(str(folder), tp).load()
    lm.model.generation_config.eos_token_id = None
    ids = tiny.tokens(2, 12)
    padded, mask = tiny.left_padded(ids, PADS)
    counts, digests = follow(lm)
    seen = {"keep": lm(ids)}
    with lm.running(ATTENTIONS):
        seen["drop"] = lm(ids)
        seen["counts"] = everyone(list(counts))
    with lm.running(BOTH):
        seen["deferred"] = lm(ids)
        seen["streams"] = everyone([d.hexdigest() for d in digests])
    with lm.running(MIXED):
        seen["mixed"] = lm(ids)
        with torch.no_grad():
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            seen["padded"] = lm.model(padded, attention_mask=mask, position_ids=positions).logits
        arguments = {"attention_mask": mask, "max_new_tokens": NEW_TOKENS, "pad_token_id": 0}
        seen["greedy"] = everyone(lm.model.generate(padded, do_sample=False, **arguments))
        torch.manual_seed(7)
        seen["sampled"] = everyone(lm.model.generate(padded, do_sample=True, **arguments))
    return seen


def quantised(folder: Path, tp: int) -> dict:
    """Quantised syncs in one shot and, where there are more than two ranks, in two."""
    lm = open_session(str(folder), tp).load()
    lm.model.generation_config.eos_token_id = None
    _, digests = follow(lm)
    ids = tiny.tokens(2, 12)
    with lm.running(QUANTISED):
        one_shot = lm(ids)
        greedy = lm.model.generate(ids, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0)
        lm.comm.one_shot_at_most = 0
        two_shots = lm(ids)
    return {
        "shots": [one_shot, two_shots],
        "bytes": everyone(lm.comm.bytes),
        "greedy": everyone(greedy),
        "streams": everyone([d.hexdigest() for d in digests]),
    }


def replicated_heads(folder: Path, tp: int) -> dict:
    """Heads of other ranks computed, too, with the cache; `refused`: where they were not loaded."""
    session = open_session(str(folder), tp)
    kv_heads = getattr(session.config, "num_key_value_heads", session.config.num_attention_heads)
    drops, ids = replicating(replicated(tp, kv_heads)), tiny.tokens(2, 12)
    lm = session.load(drops=drops)
    lm.model.generation_config.eos_token_id = None
    seen, held = {"keep": lm(ids)}, sum(p.numel() for p in lm.model.parameters())
    with lm.running(drops):
        seen["logits"] = lm(ids)
        seen["greedy"] = everyone(lm.model.generate(ids, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0))
    without = session.load()
    seen["more"] = everyone(held - sum(p.numel() for p in without.model.parameters()))
    try:
        with without.running(drops):
            pass
    except InputError as e:
        seen["refused"] = str(e)
    return seen


def long(folder: Path, tp: int) -> dict:
    """512 tokens decoded in bfloat16."""
    lm = open_session(str(folder), tp).load(dtype="bfloat16")
    lm.model.generation_config.eos_token_id = None
    counts, digests = follow(lm)
    with lm.running(Drops.of_blocks([KEEP, DROP, DROP, DROP], MLP)):
        ids = lm.model.generate(tiny.tokens(1, 8), do_sample=False, max_new_tokens=512, pad_token_id=0)
    return {
        "length": ids.shape[1],
        "forwards": len(counts),
        "streams": everyone([d.hexdigest() for d in digests]),
    }


def main() -> None:
    torch.set_num_threads(1)
    tp, folder = int(sys.argv[1]), Path(sys.argv[2])
    seen = {name: family(folder / name, tp) for name in tiny.SUPPORTED}
    for name in ("llama", "gemma2"):
        seen[f"quantised {name}"] = quantised(folder / name, tp)
    for name in REPLICATING:
        seen[f"replicated {name}"] = replicated_heads(folder / name, tp)
    seen[LONG] = long(folder / LONG, tp)
    lm = open_session(str(folder / SMALL_VOCABULARY), tp).load()
    with lm.running(MIXED):
        seen[SMALL_VOCABULARY] = lm(tiny.tokens(2, 12, vocab=9))
    if is_main_rank():
        torch.save(seen, folder / f"seen_{tp}.pt")


if __name__ == "__main__":
    with ending_together():
        main()
