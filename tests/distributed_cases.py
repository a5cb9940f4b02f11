"""What test_distributed.py and the ranks it starts (run_cases.py) have to agree on."""

from spd_calib.formats.drops import Drops, Strategy

KEEP, DROP, PLAIN = Strategy.KEEP_SYNC, Strategy.BLOCK_DROP, Strategy.PLAIN_DROP
BLOCKS = 4
ATTENTION = (KEEP, PLAIN, DROP, PLAIN)
MLP = (DROP, KEEP, DROP, KEEP)
MIXED = Drops.of_blocks(ATTENTION, MLP)
ATTENTIONS = Drops.of_blocks([DROP] * BLOCKS)  # every attention's sync point
BOTH = Drops.of_blocks([DROP] * BLOCKS, MLP)
PADS = [0, 3]
NEW_TOKENS = 12
LONG = "long"  # a checkpoint with 640 positions
SMALL_VOCABULARY = "small_vocabulary"  # 9 tokens: 3, 3, 3 and none at TP 4
