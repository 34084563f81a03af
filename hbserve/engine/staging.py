"""The copy of several host arrays to the device at once: small copies cost more in launches than in bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_ALIGNMENT_BYTES = 16
_NUM_BUFFERS_OF_SIZE = 6
"""More than there are steps in flight."""
_MAX_BUFFER_BYTES = 1 << 19
_NUM_STEP_BUFFERS = 8
"""Host copies of a decode step's inputs: more than there are steps in flight."""


def reserve_pinned_memory() -> None:
    """Have torch keep pinned memory of the sizes that steps need, in powers of two: an allocation stops the device.

    Larger buffers are for prompts, whose steps are long anyway.
    """
    sizes = [1 << power for power in range(_MAX_BUFFER_BYTES.bit_length())]
    _ = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for size in sizes for _ in range(_NUM_BUFFERS_OF_SIZE)]


def to_device(arrays: Mapping[str, npt.NDArray[np.generic]], device: torch.device) -> dict[str, torch.Tensor]:
    """Return the arrays as tensors on the device, views of one buffer; do not wait for the copy."""
    offsets, end = {}, 0
    for name, array in arrays.items():
        offsets[name] = end
        end += array.nbytes + -array.nbytes % _ALIGNMENT_BYTES
    # torch does not reuse pinned memory until the copy that reads it is done
    buffer = torch.empty(end, dtype=torch.uint8, pin_memory=device.type == "cuda")
    host = buffer.numpy()
    for name, array in arrays.items():
        host[offsets[name] : offsets[name] + array.nbytes].view(array.dtype).reshape(array.shape)[...] = array
    buffer = buffer.to(device, non_blocking=True)
    return {
        name: buffer[offsets[name] : offsets[name] + array.nbytes]
        .view(torch.from_numpy(np.empty(0, array.dtype)).dtype)
        .view(array.shape)
        for name, array in arrays.items()
    }


@dataclass(frozen=True)
class _Field:
    """One input array of a step, at a fixed place in the buffer.

    With ``per_piece`` it has an entry for each piece of attention, not for each row, and is padded already. ``extra``
    entries follow those of the rows.
    """

    name: str
    dtype: type[np.generic]
    padding: int
    per_piece: bool = False
    extra: int = 0


STEP_FIELDS = (
    _Field("token_ids", np.int64, 0),
    _Field("positions", np.int64, 0),
    _Field("num_stored", np.int64, 0),
    _Field("slots", np.int64, 0),
    _Field("slot_mapping", np.int64, -1),
    _Field("seeds", np.int64, 0),
    _Field("temperatures", np.float32, 0),
    _Field("pieces", np.int32, -1, per_piece=True),
    _Field("first_piece", np.int32, 0),
    _Field("first_row", np.int32, 0, extra=1),
    _Field("chunk_len", np.int32, 1),
    _Field("indptr", np.int32, 0, extra=1),
)


class StepInputs:
    """The input arrays of a step on the device, and several host copies that are filled in turn.

    The page indices come last, so that one copy of a prefix of the buffer moves only as many as there are.
    """

    def __init__(self, max_rows: int, max_pieces: int, max_pages: int, device: torch.device) -> None:
        from hbserve.platform import small_copies  # needs Triton, as all captured steps

        self._copy_small, self._max_small_bytes = small_copies.copy_small, small_copies.MAX_SMALL_BYTES
        self._offsets: dict[str, int] = {}
        end = 0
        for field in STEP_FIELDS:
            self._offsets[field.name] = end
            end += (max_pieces if field.per_piece else max_rows + 1) * np.dtype(field.dtype).itemsize
            end += -end % _ALIGNMENT_BYTES
        self._indices_offset = end
        num_bytes = end + 4 * max_pages
        self._device = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self._host = [torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(_NUM_STEP_BUFFERS)]
        self._copied: list[Any] = [torch.cuda.Event() for _ in range(_NUM_STEP_BUFFERS)]  # type: ignore[no-untyped-call]
        self._views = [self._views_of(host.numpy(), max_rows, max_pieces) for host in self._host]
        self._turn = self._end = 0
        self.indices = self._device[self._indices_offset :].view(torch.int32)

    def _views_of(self, host: npt.NDArray[np.uint8], max_rows: int, max_pieces: int) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays of a host copy, and the page indices: a step has no time to make so many views."""
        views: dict[str, npt.NDArray[Any]] = {"indices": host[self._indices_offset :].view(np.int32)}
        for field in STEP_FIELDS:
            begin, entries = self._offsets[field.name], max_pieces if field.per_piece else max_rows + 1
            views[field.name] = host[begin : begin + entries * np.dtype(field.dtype).itemsize].view(field.dtype)
        return views

    def tensor(self, name: str, size: int) -> torch.Tensor:
        """Return the first ``size`` entries of an array on the device."""
        field = next(field for field in STEP_FIELDS if field.name == name)
        dtype = torch.from_numpy(np.empty(0, field.dtype)).dtype
        begin = self._offsets[name]
        return self._device[begin : begin + size * dtype.itemsize].view(dtype)

    def fill(self, arrays: dict[str, npt.NDArray[Any]], indices: npt.NDArray[np.int32], size: int) -> None:
        """Write a step's arrays, padded to ``size`` rows, into the next host copy."""
        views = self._next_views()
        for field in STEP_FIELDS:
            view, array = views[field.name], arrays[field.name]
            count = len(array)
            view[:count] = array
            if not field.per_piece and count < size + field.extra:
                view[count : size + field.extra] = field.padding
        self._fill_indices(views, indices)

    def fill_row(self, values: Mapping[str, float], indices: npt.NDArray[np.int32]) -> None:
        """Write a step of one row, without what has no value, into the next host copy."""
        views = self._next_views()
        for name, value in values.items():
            views[name][0] = value
        self._fill_indices(views, indices)

    def _next_views(self) -> dict[str, npt.NDArray[Any]]:
        self._turn = (self._turn + 1) % _NUM_STEP_BUFFERS
        self._copied[self._turn].synchronize()
        return self._views[self._turn]

    def _fill_indices(self, views: dict[str, npt.NDArray[Any]], indices: npt.NDArray[np.int32]) -> None:
        self._end = self._indices_offset + indices.nbytes
        views["indices"][: len(indices)] = indices

    def fill_in_tokens(self, token_ids: npt.NDArray[np.int64]) -> None:
        """Overwrite the tokens that `fill` has written."""
        self._views[self._turn]["token_ids"][: len(token_ids)] = token_ids

    def copy(self) -> None:
        """Queue the copy to the device of what `fill` has written."""
        if self._end <= self._max_small_bytes:
            self._copy_small(self._host[self._turn][: self._end], self._device[: self._end])
        else:
            self._device[: self._end].copy_(self._host[self._turn][: self._end], non_blocking=True)
        self._copied[self._turn].record()
