"""What test_distributed.py and the ranks it starts (run_cases.py) have to agree on."""

from spd_calib.formats.drops import Drop, Drops, Point, Strategy

KEEP, DROP, PLAIN = Strategy.KEEP_SYNC, Strategy.BLOCK_DROP, Strategy.PLAIN_DROP
BLOCKS = 4
ATTENTION = (KEEP, PLAIN, DROP, PLAIN)
MLP = (DROP, KEEP, DROP, KEEP)
MIXED = Drops.of_blocks(ATTENTION, MLP)
ATTENTIONS = Drops.of_blocks([DROP] * BLOCKS)  # every attention's sync point
BOTH = Drops.of_blocks([DROP] * BLOCKS, MLP)
BITS = {(0, "attention"): 8, (0, "mlp"): 4, (1, "mlp"): 6, (3, "attention"): 4, (3, "mlp"): 8}
QUANTISED = Drops.of_blocks([KEEP, DROP, DROP, KEEP], [KEEP, KEEP, DROP, KEEP]) | Drops.of_bits(
    {Point(*place): bits for place, bits in BITS.items()}
)  # of a sum alone, of what block 1's attention owes with its MLP's, of what all of block 2 owes with block 3's
BEFORE_REPLICATED = (KEEP, DROP, KEEP, KEEP)  # of the MLPs: block 2's ranks do not read the same
REPLICATING = ("llama", "opt", "phi3", "gemma2", "minicpm3")


def replicated(tp: int, kv_heads: int) -> dict[int, tuple[tuple[int, ...], ...]]:
    """KV groups by block and rank: all of the others in block 0, every other one in block 2."""
    groups = max(tp, kv_heads)
    others = tuple(tuple(g for g in range(groups) if g * tp // groups != rank) for rank in range(tp))
    return {0: others, 2: tuple(own[::2] for own in others)}


def replicating(groups: dict[int, tuple[tuple[int, ...], ...]]) -> Drops:
    """Every attention's sync point dropped, in some blocks with these KV groups replicated."""
    more = {Point(b, "attention"): Drop(DROP, replicated=own) for b, own in groups.items()}
    return Drops.of_blocks([DROP] * BLOCKS, BEFORE_REPLICATED) | Drops(more)


PADS = [0, 3]
NEW_TOKENS = 12
LONG = "long"  # a checkpoint with 640 positions
SMALL_VOCABULARY = "small_vocabulary"  # 9 tokens: 3, 3, 3 and none at TP 4
