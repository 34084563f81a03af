"""Whether the system can serve, and who waits to hear of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from hbserve.messages.client import NotReady, Ready
from hbserve.messages.worker import Hello
from hbserve.scheduler.instance import InstanceHandle
from hbserve.scheduler.transfer_tracker import TransferTracker


class Readiness:
    """Tells clients once, when every instance is there and every KV link is open, or why not in time.

    Args:
        instances: all there are, by id.
        transfers: whose links must be open.
        reply: to a client.

    Attributes:
        max_model_len: most tokens of prompt and output together; None until an instance has been there.
        vocab_size: of the model, likewise 0.
    """

    def __init__(
        self,
        instances: Mapping[str, InstanceHandle],
        transfers: TransferTracker,
        reply: Callable[[bytes, Ready | NotReady], None],
    ) -> None:
        self.max_model_len: int | None = None
        self.vocab_size = 0
        self._instances = instances
        self._transfers = transfers
        self._reply = reply
        self._subscribers: dict[bytes, float] = {}

    def on_hello(self, hello: Hello) -> None:
        """An instance has said what its model takes; the least of all counts."""
        self.max_model_len = min(hello.max_model_len, self.max_model_len or hello.max_model_len)
        self.vocab_size = hello.vocab_size

    def subscribe(self, client: bytes, deadline_s: float) -> None:
        """A client wants to know, by then at the latest."""
        self._subscribers[client] = time.monotonic() + deadline_s
        self.announce()

    def on_client_gone(self, client: bytes) -> None:
        """A client has gone."""
        self._subscribers.pop(client, None)

    def announce(self) -> None:
        """Tell all who wait, if it is so."""
        if self.max_model_len is None or self._transfers.connecting:
            return
        if not all(instance.ready for instance in self._instances.values()):
            return
        self._tell(list(self._subscribers), Ready(max_model_len=self.max_model_len, vocab_size=self.vocab_size))

    def deny(self, reason: str) -> None:
        """Tell all who wait that it will not be."""
        self._tell(list(self._subscribers), NotReady(reason=reason))

    def check_deadlines(self, now: float) -> None:
        """Tell those who have waited long enough."""
        late = [client for client, deadline in self._subscribers.items() if now > deadline]
        if late:
            self._tell(late, NotReady(reason=f"not ready in time: {self.name_missing()}"))

    def name_missing(self) -> str:
        """In words."""
        missing = []
        for instance in self._instances.values():
            if not instance.ready:
                at = "".join(f" at {worker.rpc.address}" for worker in instance.workers.values())
                missing.append(f"{instance.id}{at} ({instance.why_lost})")
        missing += [f"the KV link {source}->{target} (not open yet)" for source, target in self._transfers.connecting]
        return ", ".join(missing) or "nobody"

    def _tell(self, clients: list[bytes], reply: Ready | NotReady) -> None:
        for client in clients:
            del self._subscribers[client]
            self._reply(client, reply)
