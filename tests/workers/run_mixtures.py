"""What real ranks make of the tiny mixtures of experts: run by torchrun, read by test_experts.py.

torchrun ... run_mixtures.py TP FOLDER     FOLDER holds a checkpoint a family; mixtures_TP.pt is left there
"""

import hashlib
import sys
from pathlib import Path

import tiny
import torch
from run_cases import everyone
from test_experts import DECODED, LONG, PLANS, plans_of

from spd_calib.formats.drops import Drops
from spd_calib.parallel.ending import ending_together
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.parallel.session import open_session
from spd_calib.ranks import is_main_rank


def follow_routers(lm: TensorParallelLM) -> list:
    """A running digest of what each router reads and gives, from now on."""
    digests = []
    for block in lm.blocks:
        if block.experts is not None:
            digests.append(hashlib.sha256())
            block.experts.router.register_forward_hook(digesting(digests[-1]))
    return digests


def digesting(digest):
    def hook(module, args, given) -> None:
        for tensor in (*args, *given):
            digest.update(tensor.contiguous().view(torch.uint8).numpy())

    return hook


def family(folder: Path, tp: int) -> dict:
    lm = open_session(str(folder), tp).load()
    seen = {}
    for name, drops in plans_of(lm).items():
        with lm.running(drops):
            seen[name] = lm(tiny.tokens(2, 8))
    if folder.name in DECODED:
        lm.model.generation_config.eos_token_id = None
        with lm.running(Drops.of_blocks(*PLANS["mixed"])):
            seen["decoded"] = lm.model.generate(tiny.tokens(2, 8), do_sample=False, max_new_tokens=6, pad_token_id=0)
    return seen


def long(folder: Path, tp: int) -> list:
    """512 tokens read and 8 decoded in bfloat16."""
    lm = open_session(str(folder), tp).load(dtype="bfloat16")
    lm.model.generation_config.eos_token_id = None
    digests = follow_routers(lm)
    with lm.running(plans_of(lm)["routers"]):
        lm.model.generate(tiny.tokens(1, 512), do_sample=False, max_new_tokens=8, pad_token_id=0)
    return everyone([d.hexdigest() for d in digests])


def main() -> None:
    torch.set_num_threads(1)
    tp, folder = int(sys.argv[1]), Path(sys.argv[2])
    seen = {name: family(folder / name, tp) for name in tiny.MIXTURES}
    seen[LONG] = long(folder / LONG, tp)
    if is_main_rank():
        torch.save(seen, folder / f"mixtures_{tp}.pt")


if __name__ == "__main__":
    with ending_together():
        main()
