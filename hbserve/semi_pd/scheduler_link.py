"""The line to the CPU scheduler: which workers there are goes out, which of them failed comes back, and windows."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable

import msgspec
import zmq

from hbserve.messages.admin import GetWindowMetrics, WindowMetrics
from hbserve.messages.client import SchedulerReply
from hbserve.messages.supervisor import MarkRotation, SetWorkers, WorkerLost
from hbserve.metrics.window_metrics import AggregatedMetrics
from hbserve.rpc.cluster_key import ClusterKey

logger = logging.getLogger(__name__)


class SchedulerLink:
    """A client of the scheduler with a thread of its own, which alone touches the socket.

    Args:
        address: of the scheduler's client socket.
        on_worker_lost: called from the thread with a worker's name and what is wrong with it.
        key: of the cluster, if there is one.
    """

    def __init__(self, address: str, on_worker_lost: Callable[[str, str], None], key: ClusterKey | None) -> None:
        self._address, self._on_worker_lost, self._key = address, on_worker_lost, key
        self._outgoing: deque[SetWorkers | GetWindowMetrics | MarkRotation | None] = deque()
        self._windows: queue.SimpleQueue[WindowMetrics] = queue.SimpleQueue()
        self._num_queries = 0
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="semi-pd-link", daemon=True)
        self._thread.start()

    def send(self, message: SetWorkers | GetWindowMetrics | MarkRotation) -> None:
        """Queue a message; in order."""
        self._outgoing.append(message)
        os.eventfd_write(self._wake, 1)

    def get_window(self, seconds: float, timeout_s: float) -> AggregatedMetrics | None:
        """The scheduler's last seconds; None if it does not answer in time. For one caller at a time."""
        self._num_queries += 1
        query_id = self._num_queries
        self.send(GetWindowMetrics(query_id=query_id, seconds=seconds))
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                answer = self._windows.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return None
            if answer.query_id == query_id:  # not a late one to an earlier question
                return msgspec.convert(answer.metrics, AggregatedMetrics)

    def mark_rotation(self, begins: bool) -> None:
        """A rotation begins, or is over: latencies that overlap it are left out of windows."""
        self.send(MarkRotation(begins=begins))

    def close(self) -> None:
        """Send what is queued and end."""
        self._outgoing.append(None)
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        os.close(self._wake)

    def _run(self) -> None:
        encoder, decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(SchedulerReply)
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.LINGER, 200)
            if self._key is not None:
                self._key.for_connecting(socket, self._address)
            socket.connect(self._address)
            poller = zmq.Poller()
            poller.register(socket, zmq.POLLIN)
            poller.register(self._wake, zmq.POLLIN)
            while True:
                ready = dict(poller.poll())
                if self._wake in ready:
                    with contextlib.suppress(BlockingIOError):
                        os.eventfd_read(self._wake)
                while self._outgoing:
                    message = self._outgoing.popleft()
                    if message is None:
                        return
                    socket.send(encoder.encode(message))
                if socket in ready:
                    reply = decoder.decode(socket.recv())
                    if isinstance(reply, WorkerLost):
                        self._on_worker_lost(reply.worker_id, reply.reason)
                    elif isinstance(reply, WindowMetrics):
                        self._windows.put(reply)
