"""Estimating what a profile costs before it is run: counted, and timed on a few sequences."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from spd_calib.formats.drops import NOTHING_DROPPED, Drops, Point, Sublayer
from spd_calib.parallel.model import TensorParallelLM

from .fisher import DRAWS, block_drop_of, first_samples
from .measure import LOGITS_AT_A_TIME, LOGITS_HELD, Reference, batches
from .scores import score

TIMED_SEQUENCES = 2
LOGITS_COMPARED = 4  # float32 tensors of LOGITS_AT_A_TIME alive at once while a plan is compared


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
    head = _seconds(lm, lambda: first.reference.compare(first.recording.final.clone()))
    seconds = (1 + sum(suffixes)) * first.forward_seconds() + (1 + len(plans)) * head
    return _estimate(
        lm,
        sequences,
        batch_size=batch_size,
        forwards=1 + sum(suffixes),
        seconds=seconds * first.scale,
        streams=blocks + 2,
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
        for final in finals:
            first.reference.compare(final)
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
    )
    return estimated, samples


class _First:
    """The first sequences, recorded to be timed; `scale` is how many times as many tokens all sequences have."""

    def __init__(self, lm: TensorParallelLM, sequences: Sequence[Sequence[int]]):
        few = sequences[:TIMED_SEQUENCES]
        self.lm = lm
        self.input_ids, self.lengths = next(batches(few, len(few), lm.device))
        self.recording = lm.record(self.input_ids)
        self.reference = Reference(lm, self.recording.final, input_ids=self.input_ids, lengths=self.lengths)
        self.scale = sum(map(len, sequences)) / sum(map(len, few))

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
) -> Estimate:
    """Return the estimate, its peak computed from the shapes of the model and of the largest batch.

    `streams` counts the tensors of the size of a batch's residual stream that are held beside a block's own work.
    """
    parameters = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in lm.model.parameters()}
    weights, size = sum(parameters.values()), next(lm.model.parameters()).element_size()
    positions = max(
        len(rows) * max(map(len, rows))
        for start in range(0, len(sequences), batch_size)
        if (rows := sequences[start : start + batch_size])
    )
    first = lm.blocks[0]
    inner = max(p.shape[-2] for mlp in first.mlps for p in mlp.parameters() if p.dim() >= 2)
    block = positions * size * ((2 * len(first.mlps) + 4) * first.width + 3 * inner)  # partial sums, MLP of one rank
    vocabulary = lm.head.vocab_size
    logits = min(positions * vocabulary, LOGITS_AT_A_TIME) * LOGITS_COMPARED * 4
    held = positions * vocabulary * 4 if positions * vocabulary <= LOGITS_HELD else 0
    stream = positions * first.width * size
    peak = weights + streams * stream + max(block, logits + 2 * stream) + held
    return Estimate(-(-len(sequences) // batch_size), sum(map(len, sequences)), forwards, seconds, weights, peak)
