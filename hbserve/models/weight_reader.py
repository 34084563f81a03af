"""Reading of tensors from safetensors files into the weight arena, by several threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from io import FileIO
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hbserve.errors import ModelError
from hbserve.model_files import TensorEntry, reason_of
from hbserve.models.checkpoint_part import CheckpointPart

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
}
_MAX_THREADS = 8
"""Threads that read; one copies some GB/s from the page cache."""
_BUFFER_BYTES = 16 << 20
"""Memory of a thread, unless a single row is larger."""


class Read(NamedTuple):
    """A part of a tensor, and the rows of the arena that it fills. Attributes: companion: see `CheckpointPart`."""

    name: str
    entry: TensorEntry
    part: CheckpointPart
    target: Tensor
    companion: TensorEntry | None = None


def read_all(reads: Sequence[Read], device: torch.device, check: Callable[[Read], None]) -> None:
    """Fill the arena.

    Args:
        device: the arena's.
        check: called after each read, in its thread.

    Raises:
        ModelError: of the first read, in their order, that cannot be done, or that ``check`` refuses.
    """
    reader = _Reader(device)

    def read_one(read: Read) -> None:
        reader.read(read)
        check(read)

    num_threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)), len(reads))
    with ThreadPoolExecutor(num_threads, "weights") as pool:
        for _ in pool.map(read_one, reads):
            pass  # an error is raised here, and the reads that have not begun are dropped


class _Reader:
    """Reads one tensor at a time in each thread that uses it.

    Rows that the arena holds as the file does go straight into it. Other slices, and all for a GPU, pass through a
    buffer of the thread, in pieces. What has to be computed from a whole tensor is computed for one after the other.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._local = threading.local()
        self._computing = threading.Lock()
        self._is_inference = torch.is_inference_mode_enabled()  # of the thread that made the arena

    def read(self, read: Read) -> None:
        """Fill the target of a read. Raises `ModelError`."""
        if not read.target.numel():
            return
        path = read.entry.path
        try:
            with torch.inference_mode(self._is_inference):
                if read.part.is_slice:
                    with path.open("rb", buffering=0) as file:
                        self._copy(file, read.entry, read.part, read.target)
                else:
                    with self._computing, ExitStack() as files:
                        source, companion = (
                            None if entry is None else _open(files, entry) for entry in (read.entry, read.companion)
                        )
                        read.target.copy_(read.part.read(source, self._device, companion))
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} cannot be read: {reason_of(error)}") from None

    def _copy(self, file: FileIO, entry: TensorEntry, part: CheckpointPart, target: Tensor) -> None:
        dtype, num_rows = _DTYPES[entry.dtype], entry.shape[0]
        row_bytes = (entry.end - entry.begin) // num_rows
        first, last = (part.start, part.stop) if part.dim == 0 else (0, num_rows)
        file.seek(entry.begin + first * row_bytes)
        has_whole_rows = part.dim == 0 or target.shape == entry.shape
        if self._device.type == "cpu" and target.dtype == dtype and has_whole_rows and target.is_contiguous():
            read_into(file, memoryview(target.view(-1).view(torch.uint8).numpy().data))
            return
        max_rows = max(1, _BUFFER_BYTES // row_bytes)
        for row in range(first, last, max_rows):
            end = min(row + max_rows, last)
            piece = self._buffer(max(_BUFFER_BYTES, row_bytes))[: (end - row) * row_bytes]
            read_into(file, memoryview(piece.numpy().data))
            source = piece.view(dtype).view(end - row, *entry.shape[1:])
            if part.dim:
                source = source.narrow(part.dim, part.start, part.stop - part.start)
            target[row - first : end - first].copy_(source)

    def _buffer(self, num_bytes: int) -> Tensor:
        buffer: Tensor | None = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) < num_bytes:
            on_gpu = self._device.type == "cuda"
            with torch.cuda.device(self._device) if on_gpu else nullcontext():  # a new thread's device is the first one
                buffer = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=on_gpu)
            self._local.buffer = buffer
        return buffer


def _open(files: ExitStack, entry: TensorEntry) -> Any:
    """Open a tensor, which reads the slice that it is indexed with."""
    return files.enter_context(safe_open(entry.path, framework="pt", device="cpu")).get_slice(entry.name)


def read_into(file: FileIO, left: memoryview) -> None:
    """Fill a view of bytes. Raises `OSError`."""
    while left:
        num_bytes = file.readinto(left)
        if not num_bytes:
            raise OSError("it is shorter than its header says")
        left = left[num_bytes:]
