"""Joins the replies of all ranks into one reply of the instance. Runs in rank 0, in its event loop."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import msgspec

from hbserve.messages.transfer import LinkOpened, TransferReply, TransferResult


class JointResults:
    """Replies to each command, kept until all ranks have replied: only then is nothing more written on any rank.

    Args:
        num_ranks: replies that make one.
        report: called with the joint reply: bytes added up, the ranks' parts in their order, and the first error if
            there is one.
        cancel: called with a transfer's id at its first error, so that the other ranks need not wait for their timeout.
    """

    def __init__(self, num_ranks: int, report: Callable[[TransferReply], None], cancel: Callable[[str], None]) -> None:
        self._num_ranks = num_ranks
        self._report = report
        self._cancel = cancel
        self._open: dict[Hashable, dict[int, TransferReply]] = {}

    def add(self, rank: int, reply: TransferReply) -> None:
        """Add the reply of one rank."""
        key: Hashable
        if isinstance(reply, TransferResult):
            key = (reply.transfer_id, reply.sent)
        else:
            key = (type(reply), reply.source_id, reply.link_epoch)
        parts = self._open.setdefault(key, {})
        has_failed = any(_error(part) is not None for part in parts.values())
        parts[rank] = reply
        if len(parts) == self._num_ranks:
            del self._open[key]
            self._report(_join([parts[number] for number in sorted(parts)]))
        elif isinstance(reply, TransferResult) and reply.error is not None and not has_failed:
            self._cancel(reply.transfer_id)

    def clear(self) -> None:
        """Forget incomplete replies, because their epoch has ended."""
        self._open.clear()


def _error(reply: TransferReply) -> str | None:
    return getattr(reply, "error", None)


def _join(parts: list[TransferReply]) -> TransferReply:
    # A rank that was told to give up is not what went wrong.
    parts_by_blame = sorted(parts, key=lambda part: getattr(part, "error_kind", None) == "cancelled")
    blamed = next((part for part in parts_by_blame if _error(part) is not None), None)
    first = parts[0]
    if isinstance(first, LinkOpened):
        peers = [part.peers[0] for part in parts if isinstance(part, LinkOpened)]
        return msgspec.structs.replace(first, peers=peers, error=None if blamed is None else _error(blamed))
    if not isinstance(first, TransferResult):
        return first
    results = [part for part in parts if isinstance(part, TransferResult)]
    checksums = [part.checksums[0] for part in results if part.checksums is not None]
    return msgspec.structs.replace(
        first,
        num_bytes=sum(part.num_bytes for part in results) if blamed is None else 0,
        seconds=max(part.seconds for part in results),
        queued_s=max(part.queued_s for part in results),
        error=None if blamed is None else _error(blamed),
        error_kind=None if blamed is None else getattr(blamed, "error_kind", None),
        checksums=checksums or None,
    )
