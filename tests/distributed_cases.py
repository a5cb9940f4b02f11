"""What test_distributed.py and the ranks it starts have to agree on."""

from spd_calib.formats.common import Strategy

KEEP, DROP, PLAIN = Strategy.KEEP_SYNC, Strategy.BLOCK_DROP, Strategy.PLAIN_DROP
ATTENTION = (KEEP, PLAIN, DROP, PLAIN)
MLP = (DROP, KEEP, DROP, KEEP)
PADS = [0, 3]
NEW_TOKENS = 12
LONG = "long"  # a checkpoint with 640 positions
SMALL_VOCABULARY = "small_vocabulary"  # 9 tokens: 3, 3, 3 and none at TP 4
