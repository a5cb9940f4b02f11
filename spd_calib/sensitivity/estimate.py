"""Estimating what a profile costs before it is run: counted, and timed on a few sequences."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from spd_calib.formats.drops import NOTHING_DROPPED, Drops, Point, Sublayer
from spd_calib.parallel.model import TensorParallelLM

from .fisher import DRAWS, block_drop_of, first_samples
from .measure import batches
from .reference import Reference, plans_at_a_time
from .scores import LOGITS_AT_A_TIME, score

TIMED_SEQUENCES = 2
LOGITS_SCORED = 4  # float32 tensors of LOGITS_AT_A_TIME alive at once while sync points are scored


@dataclass(frozen=True)
class Estimate:
    """The forwards, the time and the memory that a profile takes."""

    batches: int
    tokens: int
    forwards: float  # passes of the whole text through all blocks
    seconds: float
    weights: int  # bytes of the model's parameters in this process
    peak: int  # bytes that this process holds at most, weights included


def estimate(
    lm: TensorParallelLM, sequences: Sequence[Sequence[int]], *, plans: Sequence[Drops], batch_size: int
) -> Estimate:
    """Return what `measure` takes for these plans: each runs the blocks from its first drop on, and the head."""
    first = _First(lm, sequences)
    blocks, begins = lm.num_blocks, [drops.first_difference(NOTHING_DROPPED) for drops in plans]
    suffixes = [0.0 if begin is None else (blocks - begin) / blocks for begin in begins]
    positions = _positions(sequences, batch_size)
    together = min(plans_at_a_time(lm, positions), max(len(plans), 1))
    dense = _seconds(lm, first.make_reference)  # of going through the vocabulary; once more for plans compared together
    both = _seconds(lm, lambda: first.reference.compare([first.reference.hidden]))
    seconds = (1 + sum(suffixes)) * first.forward_seconds()
    seconds += (1 + math.ceil(len(plans) / together)) * dense + len(plans) * max(both - dense, 0)
    return _estimate(
        lm,
        sequences,
        batch_size=batch_size,
        forwards=1 + sum(suffixes),
        seconds=seconds * first.scale,
        streams=blocks + 2 + together,
    )


def one_after_another(each: Sequence[Estimate]) -> Estimate:
    """Return what the same experiments take on several texts, from the estimate of each text."""
    tokens = sum(e.tokens for e in each)
    return Estimate(
        batches=sum(e.batches for e in each),
        tokens=tokens,
        forwards=sum(e.forwards * e.tokens for e in each) / tokens,
        seconds=sum(e.seconds for e in each),
        weights=each[0].weights,
        peak=max(e.peak for e in each),
    )


def estimate_fisher(
    lm: TensorParallelLM,
    sequences: Sequence[Sequence[int]],
    *,
    sync_points: Sequence[Sublayer],
    target_stderr: float,
    batch_size: int,
) -> tuple[Estimate, int]:
    """Return what the first pass of fisher.predict takes, and the samples it draws.

    The sampling error found in the first pass may call for further passes, which are not in the estimate.
    """
    first = _First(lm, sequences)
    samples = first_samples(len(sequences), target_stderr)
    generator = torch.Generator(lm.device).manual_seed(0)
    middle = block_drop_of(Point(lm.num_blocks // 2, "attention"))  # what is drawn stands there on average

    def run() -> None:
        finals = [lm.resume(first.recording, middle) for _ in range(DRAWS)]
        first.reference.compare([first.reference.streams(final) for final in finals])
        score(
            lm,
            first.recording,
            lengths=first.lengths,
            sync_points=sync_points,
            samples=samples,
            generator=generator,
            dropped=finals[0],
        )

    whole = first.forward_seconds()
    seconds = whole + _seconds(lm, run)
    streams = lm.num_blocks + 2 + 8 * (1 + samples)  # a block's activations and its gradients, sample by sample
    estimated = _estimate(
        lm,
        sequences,
        batch_size=batch_size,
        forwards=seconds / whole,
        seconds=seconds * first.scale,
        streams=streams,
        logits=LOGITS_AT_A_TIME,
    )
    return estimated, samples


class _First:
    """The first sequences, recorded to be timed; `scale` is how many times as many tokens all sequences have."""

    def __init__(self, lm: TensorParallelLM, sequences: Sequence[Sequence[int]]):
        few = sequences[:TIMED_SEQUENCES]
        self.lm = lm
        self.input_ids, self.lengths = next(batches(few, len(few), lm.device))
        self.recording = lm.record(self.input_ids)
        self.reference = self.make_reference()
        self.scale = sum(map(len, sequences)) / sum(map(len, few))

    def make_reference(self) -> Reference:
        """Return what plans are compared with on these sequences."""
        return Reference(self.lm, self.recording.final, input_ids=self.input_ids, lengths=self.lengths)

    def forward_seconds(self) -> float:
        """Return the time of one forward through all blocks."""
        return _seconds(self.lm, lambda: self.lm.record(self.input_ids))


def _seconds(lm: TensorParallelLM, run: Callable[[], object]) -> float:
    """Return the time of the second of two runs: the first allocates memory."""
    for _ in range(2):
        start = time.perf_counter()
        run()
        if lm.device.type == "cuda":
            torch.cuda.synchronize(lm.device)
    return time.perf_counter() - start


def _estimate(
    lm: TensorParallelLM,
    sequences: Sequence[Sequence[int]],
    *,
    batch_size: int,
    forwards: float,
    seconds: float,
    streams: int,
    logits: int = 0,
) -> Estimate:
    """Return the estimate, its peak computed from the shapes of the model and of the largest batch.

    `streams` counts the tensors of the size of a batch's residual stream that are held beside a block's own work,
    `logits` the numbers in each of the LOGITS_SCORED tensors of logits.
    """
    parameters = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in lm.model.parameters()}
    weights, size = sum(parameters.values()), next(lm.model.parameters()).element_size()
    positions = _positions(sequences, batch_size)
    first = lm.blocks[0]
    inner = max(p.shape[-2] for mlp in first.mlps for p in mlp.parameters() if p.dim() >= 2)
    block = positions * size * ((2 * len(first.mlps) + 4) * first.width + 3 * inner)  # partial sums, MLP of one rank
    stream = positions * first.width * size
    scored = min(positions * lm.head.vocab_size, logits) * LOGITS_SCORED * 4
    peak = weights + streams * stream + max(block, scored + 2 * stream)
    return Estimate(-(-len(sequences) // batch_size), sum(map(len, sequences)), forwards, seconds, weights, peak)


def _positions(sequences: Sequence[Sequence[int]], batch_size: int) -> int:
    """Return how many positions the largest batch has, padding included."""
    return max(
        len(rows) * max(map(len, rows))
        for start in range(0, len(sequences), batch_size)
        if (rows := sequences[start : start + batch_size])
    )
