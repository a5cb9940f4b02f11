"""What happens with every causal language model that transformers has: `make families` writes docs/families.md.

Each class is tried with its default configuration: the form of its blocks on the meta device, then a small random copy
(2 blocks, few heads), which must give what the dense model gives with every sync point kept on two ranks, and with
every one dropped on a single rank, where nothing is missing that a drop could lose; but for attention's in front of a
router, which does not read what is dropped.
"""

import argparse
import copy
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from spd_calib.errors import InputError
from spd_calib.formats.drops import Drops, Point, Strategy
from spd_calib.models.config_checks import choose_attention, refuse_other_kinds
from spd_calib.models.load import check_config
from spd_calib.models.source import Source
from spd_calib.models.text_part import text_config
from spd_calib.parallel.comm import SimulatedComm
from spd_calib.parallel.model import TensorParallelLM, tolerance
from spd_calib.parallel.small_copy import RANKS, narrowed

BLOCKS = 2
RUNS, TEXT_RUNS = "runs", "its language model runs, reading text"
HEAD = """# Every causal language model of transformers

What happens with each class of transformers {version} at its default configuration; written by `make families`.
*Runs*: a small random copy of it gives the dense model's logits with every sync point kept on two ranks, and with every
one dropped on a single rank (of a mixture of experts, its first MLP's). Everything else ends in the sentence shown and
exit code 2: none gives a number. A default configuration is often that of no real checkpoint: those of DeepSeek V2,
Gemma 4, HunYuan and Nemotron are refused for it, and [their checkpoints run](architectures.md). Of the models of text
and images those that transformers lists among the causal ones stand here; [all that are
taken](limits.md#models-of-text-and-images).

| class | what happens |
|---|---|
"""


def small(config: Any) -> Any:
    """Return a copy of a configuration with BLOCKS blocks, few heads, neurons and tokens."""
    few = copy.deepcopy(config)
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == config.num_hidden_layers:
            setattr(few, name, value[:BLOCKS])
    if of_blocks := config.to_dict().get("per_layer_config"):
        few.per_layer_config = {int(i): own for i, own in of_blocks.items() if int(i) < BLOCKS}
    few.num_hidden_layers = BLOCKS
    return narrowed(few)


@torch.no_grad()
def run(config: Any) -> None:
    """Compare a small copy with its dense model. Raises InputError, as the commands do, or where they differ."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False).eval()
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape))
    model.generation_config = GenerationConfig(pad_token_id=0)
    ids = torch.randint(1, 64, (2, 12))
    dense = model(input_ids=ids, use_cache=False).logits
    TensorParallelLM.simulated(copy.deepcopy(model), RANKS)
    alone = TensorParallelLM(copy.deepcopy(model), SimulatedComm(1))
    points = [Point(0, "mlp"), *(Point(i, "attention") for i in range(BLOCKS))]
    dropped = [p for p in points if p.sync_point == "mlp" or alone.blocks[p.block].experts is None]
    with alone.running(Drops.of(dict.fromkeys(dropped, Strategy.BLOCK_DROP))):
        error = (alone(ids) - dense).abs().max().item()
    if not error <= tolerance(dense):
        raise AssertionError(f"with every sync point dropped on one rank its logits are off by {error:.2g}")


def outcome(model_type: str, name: str) -> str:
    """Return what happens with a class: RUNS, or the sentence."""
    try:
        config = CONFIG_MAPPING[model_type]()
        config.architectures = [name]
    except Exception as e:
        return f"transformers has no default configuration of it ({type(e).__name__})"
    try:
        whole, config = config, text_config(Source("It", Path(), None), config)
        refuse_other_kinds(Source("It", Path(), None), config)
        choose_attention(config)
        check_config(config, RANKS)
        run(small(config))
    except InputError as e:
        return str(e)
    except AssertionError:
        raise
    except Exception as e:
        said = (str(e).strip().splitlines() or [type(e).__name__])[0]
        return f"a small copy of its default configuration does not run in transformers ({said[:120]})"
    return RUNS if config is whole else TEXT_RUNS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/families.md"))
    output = parser.parse_args().output
    logging.disable(logging.WARNING)
    transformers_logging.set_verbosity_error()
    found: dict[str, str] = {}
    for model_type, names in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()):
        for name in [names] if isinstance(names, str) else names:
            if found.get(name) != RUNS:  # of several configurations the one that it runs with, such as its text part's
                found[name] = outcome(model_type, name)
                print(name, found[name], sep=": ", file=sys.stderr, flush=True)
    rows = list(found.items())
    import transformers

    rows.sort(key=lambda row: (row[1] not in (RUNS, TEXT_RUNS), row[0].lower()))
    lines = [f"| `{name}` | {said.replace('|', '/')} |" for name, said in rows]
    output.write_text(HEAD.format(version=transformers.__version__) + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
