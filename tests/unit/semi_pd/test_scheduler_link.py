"""The connection of a rotation manager to the scheduler."""

from __future__ import annotations

import queue
from pathlib import Path

import msgspec
import zmq

from hbserve.messages.client import SchedulerReply
from hbserve.messages.supervisor import WorkerLost
from hbserve.semi_pd.scheduler_link import SchedulerLink

DEADLINE_S = 10.0


def test_the_connection_outlives_a_message_that_cannot_be_dealt_with(short_path: Path) -> None:
    lost: queue.SimpleQueue[str] = queue.SimpleQueue()

    def on_worker_lost(name: str, reason: str) -> None:
        lost.put(name)
        raise RuntimeError("there is no memory")

    with zmq.Context() as context, context.socket(zmq.ROUTER) as scheduler:
        scheduler.setsockopt(zmq.LINGER, 0)
        scheduler.setsockopt(zmq.RCVTIMEO, int(1000 * DEADLINE_S))
        address = f"ipc://{short_path}/scheduler"
        scheduler.bind(address)
        link = SchedulerLink(address, on_worker_lost, lambda: None, None)
        link.mark_rotation(begins=True)
        identity, _ = scheduler.recv_multipart()
        encode = msgspec.msgpack.Encoder().encode
        for name in ("first", "second"):
            reply: SchedulerReply = WorkerLost(worker_id=name, reason="killed")
            scheduler.send_multipart([identity, encode(reply)])
        assert [lost.get(timeout=DEADLINE_S) for _ in range(2)] == ["first", "second"]
        link.mark_rotation(begins=False)
        assert scheduler.recv_multipart()[0] == identity
        link.close()
