"""One reply of an instance, out of the replies of all its ranks."""

from __future__ import annotations

import msgspec

from hbserve.kv_transfer.joint_results import JointResults
from hbserve.messages.transfer import LinkOpened, Peer, TransferReply, TransferResult


def part(transfer_id: str, error: str | None = None) -> TransferResult:
    num_bytes = 0 if error else 10
    return TransferResult(epoch=1, transfer_id=transfer_id, sent=True, num_bytes=num_bytes, seconds=1.0, error=error)


def test_a_transfer_is_over_when_it_is_over_on_every_rank() -> None:
    reported: list[TransferReply] = []
    cancelled: list[str] = []
    results = JointResults(3, reported.append, cancelled.append)
    for rank in (2, 0):
        results.add(rank, part("good"))
    results.add(0, part("bad"))
    results.add(1, part("bad", "the cable was pulled"))
    assert not reported
    assert cancelled == ["bad"], "the other ranks are not left to their timeouts"
    results.add(2, part("bad", "cancelled"))
    results.add(1, part("good"))
    results_reported = [result for result in reported if isinstance(result, TransferResult)]
    assert [(result.transfer_id, result.num_bytes, result.error) for result in results_reported] == [
        ("bad", 0, "the cable was pulled"),
        ("good", 30, None),
    ]
    assert cancelled == ["bad"]


def test_the_parts_of_all_ranks_are_joined_in_their_order() -> None:
    reported: list[TransferReply] = []
    results = JointResults(2, reported.append, print)
    for rank in (1, 0):
        peer = Peer(rank=rank, epoch=1, endpoint=f"rank {rank}")
        results.add(rank, LinkOpened(epoch=1, source_id="a", link_epoch=3, peers=[peer]))
        results.add(rank, msgspec.structs.replace(part("t"), seconds=1.0 + rank, checksums=[[rank, 7]]))
    opened, result = reported
    assert isinstance(opened, LinkOpened)
    assert [peer.endpoint for peer in opened.peers] == ["rank 0", "rank 1"]
    assert isinstance(result, TransferResult)
    assert (result.seconds, result.num_bytes, result.checksums) == (2.0, 20, [[0, 7], [1, 7]])


def test_replies_of_an_epoch_that_has_ended_are_forgotten() -> None:
    reported: list[TransferReply] = []
    results = JointResults(2, reported.append, print)
    results.add(0, part("t"))
    results.clear()
    results.add(1, part("t"))
    assert not reported
