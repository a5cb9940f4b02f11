"""Fingerprints of a checkpoint's content: the same weights give the same one, however they are cut into files."""

import hashlib
import json
import mmap
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from spd_calib.errors import InputError

from .stored import MAX_HEADER_BYTES, safetensors_files


def weight_fingerprint(folder: Path) -> str:
    """Return the sha256 over the sorted sha256 of (name, dtype, shape, bytes) of every tensor in a checkpoint's files.

    Raises InputError where a file is not whole.
    """
    digests: list[str] = []
    for path in safetensors_files(folder):
        try:
            with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
                digests += _tensor_digests(memoryview(data))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise InputError(
                f"{path} is not a whole safetensors file, it may be cut off; fetch the model again."
            ) from None
    return digest_of_all(digests)


def digest_of_all(digests: Iterable[str]) -> str:
    """Return the fingerprint of a checkpoint whose tensors have these digests, in any order."""
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()


def tensor_digest(name: str, *, dtype: str, shape: Sequence[int], content: bytes | memoryview) -> str:
    """Return the sha256 of a tensor under the name, the kind of number and the shape that safetensors gives it."""
    h = hashlib.sha256(json.dumps([name, dtype, list(shape)]).encode())
    h.update(content)  # hashlib lets other threads run meanwhile
    return h.hexdigest()


def _tensor_digests(data: memoryview) -> list[str]:
    """Return a digest for each tensor of a safetensors file: 8 bytes header length, JSON header, then the bytes."""
    try:
        header_end = 8 + int.from_bytes(data[:8], "little")
        if header_end > min(len(data), 8 + MAX_HEADER_BYTES):
            raise ValueError("header beyond the end of the file, or larger than the format allows")
        header = json.loads(bytes(data[8:header_end]))
        header.pop("__metadata__", None)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(partial(_digest, data, header_end), header.items()))
    finally:
        data.release()


def _digest(data: memoryview, header_end: int, item: tuple[str, dict]) -> str:
    """Return the digest of one tensor, given as its name and its entry in the header."""
    name, info = item
    begin, end = (header_end + offset for offset in info["data_offsets"])
    if not header_end <= begin <= end <= len(data):
        raise ValueError("tensor beyond the end of the file")
    return tensor_digest(name, dtype=info["dtype"], shape=info["shape"], content=data[begin:end])


def config_hash(config: dict) -> str:
    """Return the sha256 of a model's configuration, without what transformers writes of itself into it."""
    volatile = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache", "_attn_implementation")
    kept = {k: v for k, v in config.items() if k not in volatile}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
