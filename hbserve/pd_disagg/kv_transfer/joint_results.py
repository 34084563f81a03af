"""One result of a transfer out of the results of all ranks."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from hbserve.messages import TransferResult


class JointResults:
    """Reports a side of a transfer when its last rank has: only then nothing more is written anywhere.

    Args:
        num_ranks: results that make one.
        report: called with the joint result: bytes added up, the first error if there is one.
        cancel: called with the transfer's id at its first error, so that the other ranks need not
            wait for their timeout.
    """

    def __init__(self, num_ranks: int, report: Callable[[TransferResult], None], cancel: Callable[[str], None]) -> None:
        self._num_ranks = num_ranks
        self._report = report
        self._cancel = cancel
        self._open: dict[tuple[str, bool], list[TransferResult]] = {}

    def add(self, result: TransferResult) -> None:
        """Take one rank's result."""
        key = (result.transfer_id, result.sent)
        parts = self._open.setdefault(key, [])
        has_failed = any(part.error is not None for part in parts)
        parts.append(result)
        if len(parts) == self._num_ranks:
            del self._open[key]
            self._report(_join(parts))
        elif result.error is not None and not has_failed:
            self._cancel(result.transfer_id)

    def clear(self) -> None:
        """Forget what is incomplete: its epoch is over."""
        self._open.clear()


def _join(parts: list[TransferResult]) -> TransferResult:
    error = next((part.error for part in parts if part.error is not None), None)
    return msgspec.structs.replace(
        parts[0],
        num_bytes=sum(part.num_bytes for part in parts) if error is None else 0,
        seconds=max(part.seconds for part in parts),
        error=error,
    )
