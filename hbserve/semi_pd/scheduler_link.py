"""Connection to the CPU scheduler: it gets the list of workers, and sends back failed workers and windows."""

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
from hbserve.messages.supervisor import MarkRotation, ReportEvent, SetWorkers, WorkerLost
from hbserve.metrics.window_metrics import AggregatedMetrics
from hbserve.rpc.cluster_key import ClusterKey

logger = logging.getLogger(__name__)

_RECONNECT_DELAY_S = 0.05


class SchedulerLink:
    """Client of the scheduler; its thread is the only user of the socket.

    When the connection breaks, the scheduler has usually ended, and a new one starts, which knows nothing. What was
    sent last may be lost.

    Args:
        address: of the scheduler's client socket.
        on_worker_lost: called from the thread with a worker's name and the reason.
        on_disconnected: called from the thread after the connection broke; messages that it sends go to the scheduler
            that comes next.
        key: of the cluster, if there is one.
    """

    def __init__(
        self,
        address: str,
        on_worker_lost: Callable[[str, str], None],
        on_disconnected: Callable[[], None],
        key: ClusterKey | None,
    ) -> None:
        self._address, self._key = address, key
        self._on_worker_lost, self._on_disconnected = on_worker_lost, on_disconnected
        self._encoder: msgspec.msgpack.Encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[SchedulerReply] = msgspec.msgpack.Decoder(SchedulerReply)
        self._outgoing: deque[SetWorkers | GetWindowMetrics | MarkRotation | ReportEvent | None] = deque()
        self._windows: queue.SimpleQueue[WindowMetrics] = queue.SimpleQueue()
        self._num_queries = 0
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="semi-pd-link", daemon=True)
        self._thread.start()

    def send(self, message: SetWorkers | GetWindowMetrics | MarkRotation | ReportEvent) -> None:
        """Queue a message; messages are sent in order."""
        self._outgoing.append(message)
        os.eventfd_write(self._wake, 1)

    def get_window(self, seconds: float, timeout_s: float) -> AggregatedMetrics | None:
        """Get the metrics of the last seconds; None without an answer in time. For one caller at a time."""
        self._num_queries += 1
        query_id = self._num_queries
        self.send(GetWindowMetrics(query_id=query_id, seconds=seconds))
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                answer = self._windows.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return None
            if answer.query_id == query_id:  # and is not the late answer to an earlier query
                return msgspec.convert(answer.metrics, AggregatedMetrics)

    def mark_rotation(self, begins: bool) -> None:
        """Say that a rotation begins or ends: the scheduler leaves latencies that overlap it out of windows."""
        self.send(MarkRotation(begins=begins))

    def close(self) -> None:
        """Send the queued messages and end the thread."""
        self._outgoing.append(None)
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        os.close(self._wake)

    def _run(self) -> None:
        with zmq.Context() as context:
            while self._serve_connection(context):
                logger.info("the connection to the scheduler broke")
                time.sleep(_RECONNECT_DELAY_S)  # a key that is not the cluster's breaks every connection at once
                self._tell(self._on_disconnected)

    @staticmethod
    def _tell(callback: Callable[..., None], *arguments: str) -> None:
        """Call back. The thread outlives what fails there, because all later messages need it."""
        try:
            callback(*arguments)
        except Exception:
            logger.exception("a message of the scheduler was not dealt with; the connection goes on")

    def _serve_connection(self, context: zmq.Context[zmq.Socket[bytes]]) -> bool:
        """Send and receive until the connection breaks; returns False at the end of the link."""
        socket = context.socket(zmq.DEALER)
        monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        try:
            socket.setsockopt(zmq.LINGER, 200)
            socket.setsockopt(zmq.RECONNECT_IVL, 50)
            socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
            if self._key is not None:
                self._key.for_connecting(socket, self._address)
            socket.connect(self._address)
            poller = zmq.Poller()
            for source in (socket, monitor, self._wake):
                poller.register(source, zmq.POLLIN)
            while True:
                ready = dict(poller.poll())
                if self._wake in ready:
                    with contextlib.suppress(BlockingIOError):
                        os.eventfd_read(self._wake)
                while self._outgoing:
                    message = self._outgoing.popleft()
                    if message is None:
                        return False
                    socket.send(self._encoder.encode(message))
                while socket.poll(0):
                    self._on_reply(self._decoder.decode(socket.recv()))
                if monitor in ready:
                    return True
        finally:
            socket.disable_monitor()
            socket.close()

    def _on_reply(self, reply: SchedulerReply) -> None:
        if isinstance(reply, WorkerLost):
            self._tell(self._on_worker_lost, reply.worker_id, reply.reason)
        elif isinstance(reply, WindowMetrics):
            self._windows.put(reply)
