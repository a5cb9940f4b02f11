"""What a profile would cost, before it is run: counted, and timed on a sequence or two."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from spd_calib.formats.profile import Point, SyncPoint
from spd_calib.parallel.model import TensorParallelLM

from .fisher import DRAWS, first_samples, run_dropped, score
from .measure import LOGITS_AT_A_TIME, LOGITS_HELD, Experiment, Reference, batches

TIMED_SEQUENCES = 2
LOGITS_COMPARED = 4  # float32 tensors of LOGITS_AT_A_TIME alive at once while a plan is compared


@dataclass(frozen=True)
class Estimate:
    """`forwards`: of the whole text through the whole model; `weights` and `peak` in bytes, of this process."""

    batches: int
    tokens: int
    forwards: float
    seconds: float
    weights: int
    peak: int


def estimate(
    lm: TensorParallelLM, sequences: Sequence[Sequence[int]], experiments: Sequence[Experiment], batch_size: int
) -> Estimate:
    """Of `measure` on these experiments: each runs the blocks from its first drop on, and the head."""
    recording, reference, scale = _first(lm, sequences)
    blocks = lm.num_blocks
    suffixes = [(blocks - e.first) / blocks for e in experiments]
    whole = _seconds(lm, lambda: lm.resume(recording, 0))
    head = _seconds(lm, lambda: reference.compare(recording.final.clone(), False))
    seconds = (1 + sum(suffixes)) * whole + (1 + len(experiments)) * head
    return _estimate(lm, sequences, batch_size, 1 + sum(suffixes), seconds * scale, blocks + 2)


def one_after_another(each: Sequence[Estimate]) -> Estimate:
    """The same experiments on several texts."""
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
    sync_points: Sequence[SyncPoint],
    target_stderr: float,
    batch_size: int,
) -> tuple[Estimate, int]:
    """Of `fisher`'s first pass, and the samples that it draws; further ones are drawn where the error asks for them."""
    recording, reference, scale = _first(lm, sequences)
    samples = first_samples(len(sequences), target_stderr)
    generator = torch.Generator(lm.device).manual_seed(0)
    middle = Point(block=lm.num_blocks // 2, sync_point="attention")  # what is drawn stands there on average

    def run() -> None:
        finals = [run_dropped(lm, recording, middle) for _ in range(DRAWS)]
        for final in finals:
            reference.compare(final, False)
        score(lm, recording, reference.lengths, sync_points, samples, generator, finals[0])

    whole = _seconds(lm, lambda: lm.resume(recording, 0))
    seconds = whole + _seconds(lm, run)
    streams = lm.num_blocks + 2 + 8 * (1 + samples)  # a block's activations and its gradients, sample by sample
    return _estimate(lm, sequences, batch_size, seconds / whole, seconds * scale, streams), samples


def _first(lm: TensorParallelLM, sequences: Sequence[Sequence[int]]):
    """A recording of the first sequences, their predictions, and how many times as long all are."""
    few = sequences[:TIMED_SEQUENCES]
    input_ids, lengths = next(batches(few, len(few), lm.device))
    lm.keep_all()
    recording = lm.record(input_ids)
    reference = Reference(lm, recording.final, input_ids, lengths)
    return recording, reference, sum(map(len, sequences)) / sum(map(len, few))


def _seconds(lm: TensorParallelLM, run: Callable[[], object]) -> float:
    """Of the second of two runs: the first allocates."""
    for _ in range(2):
        start = time.perf_counter()
        run()
        if lm.device.type == "cuda":
            torch.cuda.synchronize(lm.device)
    return time.perf_counter() - start


def _estimate(
    lm: TensorParallelLM,
    sequences: Sequence[Sequence[int]],
    batch_size: int,
    forwards: float,
    seconds: float,
    streams: int,
) -> Estimate:
    """`streams`: tensors as large as one batch's residual stream that are held at once, a block's work apart."""
    parameters = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in lm.model.parameters()}
    weights, size = sum(parameters.values()), next(lm.model.parameters()).element_size()
    positions = max(
        len(rows) * max(map(len, rows))
        for start in range(0, len(sequences), batch_size)
        if (rows := sequences[start : start + batch_size])
    )
    first = lm.blocks[0]
    inner = max(p.shape[0] for mlp in first.mlps for p in mlp.parameters() if p.dim() == 2)
    block = positions * size * ((2 * len(first.mlps) + 4) * first.width + 3 * inner)  # partial sums, MLP of one rank
    vocabulary = lm.head.vocab_size
    logits = min(positions * vocabulary, LOGITS_AT_A_TIME) * LOGITS_COMPARED * 4
    held = positions * vocabulary * 4 if positions * vocabulary <= LOGITS_HELD else 0
    stream = positions * first.width * size
    peak = weights + streams * stream + max(block, logits + 2 * stream) + held
    return Estimate(-(-len(sequences) // batch_size), sum(map(len, sequences)), forwards, seconds, weights, peak)
