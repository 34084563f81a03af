"""The fingerprint of a model: a short name that is equal only for equal architecture and weights.

It covers every byte of the weights: workers whose models have one fingerprint share KV blocks, by transfers and tiers.
Threads of a rank's process compute it while the main thread loads the same files. The digest of files that have not
changed is read from the cache folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import TracebackType

import torch

from hbserve.cache_folder import cache_folder
from hbserve.errors import ModelError
from hbserve.model_files import TensorEntry, checkpoint_tensors, reason_of
from hbserve.model_spec import ModelSpec
from hbserve.models.weight_reader import read_into

_FORMAT = 1
"""Raised when the digest of the same weights changes, because digests are kept."""
_CHARACTERS = 16
_WORD_BYTES, _ROW_WORDS = 8, 4096
_BUFFER_BYTES = 16 << 20
_MAX_THREADS = 4
"""Threads that read and sum; one does some GB/s, and others load the weights meanwhile."""
_DIGEST = re.compile("[0-9a-f]{64}")
_MIN_KEPT_BYTES = 64 << 20
"""Digests of smaller models are not kept: they take no time."""


def model_fingerprint(weights: str, spec: ModelSpec) -> str:
    """Return the fingerprint of an architecture with weights of a digest, however files divide the weights."""
    # The dtype of KV is no property of the model; instances compare it by itself.
    facts = repr(replace(spec, kv_format=None)) + weights
    return hashlib.sha256(facts.encode()).hexdigest()[:_CHARACTERS]


class WeightsDigest:
    """A digest of weights, computed in threads that `__exit__` ends.

    It covers each tensor's name, dtype, shape and bytes.

    Args:
        folder: of the model.
        dummy_seed: seed of random weights, which need no files; None: the weights are the folder's.
    """

    def __init__(self, folder: str | Path, dummy_seed: int | None = None) -> None:
        self._folder, self._dummy_seed = Path(folder), dummy_seed
        self._is_over = False
        self._pool = ThreadPoolExecutor(min(_MAX_THREADS, len(os.sched_getaffinity(0))) + 1, "fingerprint")
        self._digest: Future[str] | None = None

    def __enter__(self) -> WeightsDigest:
        self._digest = self._pool.submit(self._compute)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_over = True
        self._pool.shutdown(cancel_futures=True)

    def result(self) -> str:
        """Wait for the digest.

        Raises:
            ModelError: the weights cannot be read.
        """
        assert self._digest is not None, "it has not been entered"
        return self._digest.result()

    def _compute(self) -> str:
        if self._dummy_seed is not None:
            return f"dummy {self._dummy_seed}"
        tensors = checkpoint_tensors(self._folder)
        keeps = sum(entry.end - entry.begin for entry in tensors.values()) >= _MIN_KEPT_BYTES
        paths = {entry.path for entry in tensors.values()}
        kept = _kept_file(paths)
        if keeps:
            with contextlib.suppress(OSError, ValueError):
                found = kept.read_text(encoding="ascii")
                if _DIGEST.fullmatch(found):  # a damaged file must not make two models one
                    return found
        digest, names = hashlib.sha256(), sorted(tensors)
        for name, part in zip(names, self._pool.map(self._sum, [tensors[name] for name in names]), strict=True):
            digest.update(name.encode() + part)
        if keeps and not self._is_over and kept == _kept_file(paths):  # they did not change meanwhile
            with contextlib.suppress(OSError):
                kept.parent.mkdir(parents=True, exist_ok=True)
                unfinished = kept.with_suffix(f".{os.getpid()}")
                unfinished.write_text(digest.hexdigest(), encoding="ascii")
                unfinished.replace(kept)
        return digest.hexdigest()

    def _sum(self, entry: TensorEntry) -> bytes:
        """Sum the bytes of a tensor: a number of 64 bits for each row of words, of which any changed word changes it.

        It is the sum of the words times random odd numbers, modulo 2^64 (multiply-add hashing, Carter and Wegman 1979).
        """
        digest = hashlib.sha256(json.dumps([entry.dtype, list(entry.shape)]).encode())
        row_bytes = _ROW_WORDS * _WORD_BYTES
        left = entry.end - entry.begin
        buffer = bytearray(-(-min(left, _BUFFER_BYTES) // row_bytes) * row_bytes)
        try:
            with entry.path.open("rb", buffering=0) as file:
                file.seek(entry.begin)
                while left and not self._is_over:
                    size = min(left, len(buffer))
                    read_into(file, memoryview(buffer)[:size])
                    num_rows = -(-size // row_bytes)
                    buffer[size : num_rows * row_bytes] = bytes(num_rows * row_bytes - size)
                    words = torch.frombuffer(buffer, dtype=torch.int64, count=num_rows * _ROW_WORDS)
                    digest.update(torch.mv(words.view(num_rows, _ROW_WORDS), _weights()).numpy().tobytes())
                    left -= size
        except OSError as error:
            raise ModelError(f"{entry.path} cannot be read: {reason_of(error)}") from None
        return digest.digest()


def _kept_file(paths: Iterable[Path]) -> Path:
    """Return where the digest of these files is kept; another file if one of them was written since."""
    stats = [(str(path.resolve()), path.stat()) for path in sorted(paths)]
    facts = [(path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for path, stat in stats]
    return cache_folder() / "fingerprints" / hashlib.sha256(repr((_FORMAT, facts)).encode()).hexdigest()[:32]


@lru_cache
def _weights() -> torch.Tensor:
    """Return the factors of a row's words, int64 ``[word]``."""
    generator = torch.Generator().manual_seed(20261130)
    return torch.randint(-(2**62), 2**62, (_ROW_WORDS,), generator=generator) * 2 + 1
