"""The states of transfers and links: every legal transition happens, and the blocks are free at the end.

Two-sided transfers from prefill-0 to decode-0: both report, and a third message finishes them where checksums are
compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hbserve import SamplingParams
from hbserve.kv_cache.block_pool import BlockState
from hbserve.messages.client import AddRequest
from hbserve.messages.transfer import TransferResult
from hbserve.scheduler.sequence import Phase
from hbserve.scheduler.transfer import TRANSITIONS, Link, Receiver, Sender, State, Transfer
from tests.support.scheduler_parts import SchedulerParts

Story = Callable[[SchedulerParts], object]


def report(parts: SchedulerParts, sent: bool, **more: Any) -> None:
    """One side of the only transfer reports."""
    [transfer_id] = parts.transfers._open
    parts.requests.on_transfer_ended(
        TransferResult(epoch=1, transfer_id=transfer_id, sent=sent, num_bytes=1, seconds=0.1, **more)
    )


def start(parts: SchedulerParts) -> None:
    parts.open_links()
    assert parts.requests.admit(parts.add("a"))
    parts.steps(1)


def arrives(parts: SchedulerParts) -> None:
    report(parts, sent=False)
    report(parts, sent=True)


def is_checked_and_arrives(parts: SchedulerParts) -> None:
    report(parts, sent=False)
    report(parts, sent=True, checksums=[[1]])
    report(parts, sent=False)


def fails_at_the_sender_after_its_delivery(parts: SchedulerParts) -> None:
    report(parts, sent=False)
    report(parts, sent=True, error="the line is dead")
    parts.close_links()


def fails_at_the_receiver(parts: SchedulerParts) -> None:
    report(parts, sent=False, error="the line is dead")
    report(parts, sent=True)
    parts.close_links()


def loses_the_receiver_while_the_link_opens(parts: SchedulerParts) -> None:
    parts.lose_memory(parts.instances["decode-0"])
    report(parts, sent=True, error="cancelled")
    parts.transfers.connect(parts.instances.values())
    parts.lose_memory(parts.instances["decode-0"])


STORIES: list[tuple[bool, Story]] = [
    (False, arrives),
    (True, is_checked_and_arrives),
    (True, fails_at_the_sender_after_its_delivery),
    (False, fails_at_the_receiver),
    (False, loses_the_receiver_while_the_link_opens),
]


def test_every_legal_transition_happens_and_no_pin_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[tuple[State, State]] = set()

    def record(owner: type, method: str, attribute: str, state: State | None = None) -> None:
        original = getattr(owner, method)

        def call(self: Any, *arguments: Any) -> None:
            seen.add((getattr(self, attribute), state or arguments[0]))
            original(self, *arguments)

        monkeypatch.setattr(owner, method, call)

    record(Link, "enter", "state")
    record(Transfer, "enter", "receiver")
    record(Transfer, "end_sender", "sender", Sender.ENDED)
    for verify, story in STORIES:
        parts = SchedulerParts("disaggregated", kv_verify=verify)
        start(parts)
        story(parts)
        parts.requests.abort_all_of(b"c")
        while parts.worker.inflight:
            parts.confirm(parts.worker)
        assert len(parts.transfers) == 0, story
        for instance in parts.instances.values():
            instance.pool.check_consistency()
            assert instance.pool.num_free_blocks == instance.pool.total_blocks, story
    assert seen == {(before, after) for before, states in TRANSITIONS.items() for after in states}


def test_blocks_of_a_request_that_ends_with_its_first_token_wait_for_its_transfers() -> None:
    parts = SchedulerParts("disaggregated", kv_verify=False)
    parts.open_links()
    prompt, sampling = [1] * 20, SamplingParams(max_tokens=9)
    sequence = parts.add_request(
        AddRequest(request_id="a", prompt_token_ids=prompt, end_token_ids=[7], sampling=sampling)
    )
    assert parts.requests.admit(sequence)
    tables = [(allocation.pool, list(allocation.block_ids)) for allocation in sequence.allocations]
    parts.steps(1)
    assert (sequence.phase, parts.outputs[-1].finish_reason) == (Phase.FINISHED, "stop")

    def num_waiting() -> list[int]:
        return [sum(pool.block_states()[block] is BlockState.PENDING for block in blocks) for pool, blocks in tables]

    assert num_waiting() == [len(blocks) for _, blocks in tables]
    report(parts, sent=True)
    assert num_waiting() == [0, len(tables[1][1])]
    report(parts, sent=False)
    assert num_waiting() == [0, 0]


def test_an_illegal_transition_is_a_bug() -> None:
    parts = SchedulerParts("disaggregated")
    start(parts)
    [transfer] = parts.transfers._open.values()
    with pytest.raises(AssertionError, match=r"RECEIVING -> Receiver\.FINISHING"):
        transfer.enter(Receiver.FINISHING)
