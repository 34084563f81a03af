"""The scheduler's end of the border to its clients."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import msgspec
import zmq

from hbserve.cluster_key import ClusterKey
from hbserve.messages.client import ClientMessage, OutputBatch, RequestOutput, SchedulerReply
from hbserve.pd_disagg.async_socket import AsyncSocket
from hbserve.pd_disagg.rpc import bind


class ClientPort:
    """Receives from any number of clients and batches what goes back to each.

    Args:
        context: the scheduler's ZeroMQ context.
        address: where clients connect.
        on_gone: called with the identity of a client that can no longer be reached.
        key: that clients over TCP must have.

    Raises:
        StartupError: if the address cannot be had.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        on_gone: Callable[[bytes], None],
        key: ClusterKey | None = None,
    ) -> None:
        self._socket = AsyncSocket(context.socket(zmq.ROUTER))
        self._socket.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # sending to a client that left is an error we see
        self._keeper = bind(self._socket, address, "the scheduler", key)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ClientMessage)
        self._outputs: defaultdict[bytes, list[RequestOutput]] = defaultdict(list)
        self._on_gone = on_gone

    async def receive(self) -> tuple[bytes, ClientMessage]:
        """The next message and who sent it.

        Raises:
            msgspec.DecodeError: if what came is not a client message.
        """
        client, payload = await self._socket.receive()
        return client, self._decoder.decode(payload)

    def push(self, client: bytes, output: RequestOutput) -> None:
        """Add to the client's next batch."""
        self._outputs[client].append(output)

    def flush(self) -> None:
        """Send every client its batch."""
        while self._outputs:
            client, outputs = self._outputs.popitem()
            self.reply(client, OutputBatch(outputs=outputs))

    def reply(self, client: bytes, reply: SchedulerReply) -> None:
        """Send at once."""
        try:
            self._socket.send([client, self._encoder.encode(reply)])
        except zmq.ZMQError:  # EHOSTUNREACH
            self._outputs.pop(client, None)
            self._on_gone(client)

    def close(self) -> None:
        """Close; what was just sent may still leave."""
        self._socket.close(linger_ms=200)
        if self._keeper is not None:
            self._keeper.close()
