"""Whether the system can serve, and the clients that wait for that."""

from __future__ import annotations

from collections.abc import Mapping

from hbserve.messages.client import Attached, NotReady, Ready
from hbserve.messages.worker import Hello
from hbserve.scheduler.core_io import Clock, OutboxWriter, Start
from hbserve.scheduler.instance import InstanceHandle
from hbserve.scheduler.transfer_tracker import TransferTracker


class Readiness:
    """Tells each subscriber once that every instance is ready and every KV link open, or why not in time.

    Attributes:
        max_model_len: largest number of tokens of prompt and output; None until an instance has registered.
        vocab_size: of the model; 0 until then.
        ended: why no request can be served any more; None while that may change. `PhaseCoverage` sets it.
    """

    def __init__(
        self,
        instances: Mapping[str, InstanceHandle],
        transfers: TransferTracker,
        clock: Clock,
        outbox: OutboxWriter,
        start: Start,
    ) -> None:
        self.max_model_len: int | None = None
        self.vocab_size = 0
        self._formats: dict[str, str] = {}
        self.ended: str | None = None
        self._instances = instances
        self._transfers = transfers
        self._clock = clock
        self._outbox = outbox
        self._scheduler_epoch = start.time_ns
        self._is_after_failure = start.predecessor is not None and start.predecessor.failed
        self._attached_early: set[bytes] = set()  # before requests are taken
        self._subscribers: dict[bytes, float] = {}
        self._failures: dict[str, str] = {}  # of instances that cannot start, until they register after all

    def on_hello(self, hello: Hello) -> None:
        """An instance has registered; the smallest ``max_model_len`` of all counts."""
        self._failures.pop(hello.instance_id, None)
        is_first = self.max_model_len is None
        self.max_model_len = min(hello.max_model_len, self.max_model_len or hello.max_model_len)
        self.vocab_size, self._formats = hello.vocab_size, hello.formats
        if is_first:
            early, self._attached_early = self._attached_early, set()
            for client in sorted(early):
                self.attach(client)

    def attach(self, client: bytes) -> None:
        """Tell a client whether requests are taken; if not, it is told again when they are."""
        takes_requests = self.max_model_len is not None
        if not takes_requests:
            self._attached_early.add(client)
        attached = Attached(
            scheduler_epoch=self._scheduler_epoch,
            takes_requests=takes_requests,
            after_failure=self._is_after_failure,
            ended=self.ended,
        )
        self._outbox.reply(client, attached)

    def subscribe(self, client: bytes, deadline_s: float) -> None:
        """Add a client; it gets its answer by the deadline."""
        self._subscribers[client] = self._clock.now + deadline_s
        self._deny_if_failed()
        self.announce()

    def on_client_gone(self, client: bytes) -> None:
        """A client has gone."""
        self._attached_early.discard(client)
        self._subscribers.pop(client, None)

    def announce(self) -> None:
        """If every instance and link is up, send `Ready` to all subscribers."""
        if self.max_model_len is None or self._transfers.connecting:
            return
        if not all(instance.ready for instance in self._instances.values()):
            return
        ready = Ready(max_model_len=self.max_model_len, vocab_size=self.vocab_size, formats=self._formats)
        self._tell(list(self._subscribers), ready)

    def on_failed(self, instance_id: str, error: str) -> None:
        """An instance cannot start. Clients that subscribe later learn it too: the failure may come before them."""
        self._failures[instance_id] = error
        self._deny_if_failed()

    def _deny_if_failed(self) -> None:
        failures = [f"{name}: {error}" for name, error in self._failures.items() if name in self._instances]
        if failures:
            self._tell(list(self._subscribers), NotReady(reason="; ".join(failures)))

    def check_deadlines(self) -> None:
        """Send `NotReady` to subscribers whose deadline has passed."""
        late = [client for client, deadline in self._subscribers.items() if self._clock.now > deadline]
        if late:
            self._tell(late, NotReady(reason=f"not ready in time: {self.name_missing()}"))

    def name_missing(self) -> str:
        """Return the instances and links that are missing, in words."""
        missing = []
        for instance in self._instances.values():
            if not instance.ready:
                at = "".join(f" at {worker.address}" for worker in instance.workers.values())
                missing.append(f"{instance.id}{at} ({instance.why_missing})")
        missing += [f"the KV link {source}->{target} (not open yet)" for source, target in self._transfers.connecting]
        return ", ".join(missing) or "nothing"

    def _tell(self, clients: list[bytes], reply: Ready | NotReady) -> None:
        for client in clients:
            del self._subscribers[client]
            self._outbox.reply(client, reply)
