"""An engine that costs nothing, with the scheduler's messages: every open request gets a token per step.

``python -m benchmarks front`` starts it in place of a scheduler.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import time

import msgspec
import zmq

from hbserve.messages.admin import GetStats, Stats
from hbserve.messages.client import (
    AbortRequest,
    AddRequest,
    Attach,
    Attached,
    ClientMessage,
    OutputBatch,
    Ready,
    RequestOutput,
    SubscribeReady,
)
from hbserve.process import event_loop
from hbserve.rpc.async_socket import AsyncSocket

MAX_MODEL_LEN = 4096
FIRST_TOKEN_ID, NUM_TOKEN_IDS = 300, 600  # ids of plain text in the demo model


class EngineStub:
    """Serves one API server until cancelled.

    Args:
        step_s: time between two steps; the first token of a request comes at once.
        max_num_seqs: requests that get tokens in one step; others wait. 0: no limit, and no request waits for a step.
    """

    def __init__(self, address: str, step_s: float, vocab_size: int, max_num_seqs: int = 0) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = AsyncSocket(self._context.socket(zmq.ROUTER))
        self._socket.socket.bind(address)
        self._step_s, self._vocab_size, self._max_num_seqs = step_s, vocab_size, max_num_seqs
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ClientMessage)
        self._left: dict[str, int] = {}
        self._client = b""

    async def run(self) -> None:
        """Serve for ever."""
        await asyncio.gather(self._receive(), self._step())

    @property
    def num_open(self) -> int:
        """Requests that get tokens."""
        return len(self._left)

    def close(self) -> None:
        """Close the socket, after `run` has been cancelled."""
        self._socket.close()
        self._context.term()

    async def _receive(self) -> None:
        while True:
            await asyncio.sleep(0)
            self._client, payload = await self._socket.receive()
            message = self._decoder.decode(payload)
            if isinstance(message, AddRequest):
                self._left[message.request_id] = message.sampling.max_tokens or 1
                if not self._max_num_seqs:
                    self._send([self._token(message.request_id)])
            elif isinstance(message, AbortRequest):
                if self._left.pop(message.request_id, None) is not None:
                    end = RequestOutput(
                        request_id=message.request_id, token_ids=[], finish_reason=message.finish_reason
                    )
                    self._send([end])
            elif isinstance(message, Attach):
                attached = Attached(scheduler_epoch=1, takes_requests=True)
                self._socket.send([self._client, self._encoder.encode(attached)])
            elif isinstance(message, SubscribeReady):
                ready = Ready(max_model_len=MAX_MODEL_LEN, vocab_size=self._vocab_size)
                self._socket.send([self._client, self._encoder.encode(ready)])
            elif isinstance(message, GetStats):
                stats = {
                    "gpu_instances": {"stub": {"status": "ready", "role": "unified"}},
                    "cpu_scheduler": {"open_requests": len(self._left)},
                }
                self._socket.send([self._client, self._encoder.encode(Stats(query_id=message.query_id, stats=stats))])

    async def _step(self) -> None:
        due = time.monotonic()
        while True:
            due = max(due + self._step_s, time.monotonic())
            await asyncio.sleep(due - time.monotonic())
            if self._left:
                running = itertools.islice(self._left, self._max_num_seqs or None)
                self._send([self._token(request_id) for request_id in list(running)])

    def _token(self, request_id: str) -> RequestOutput:
        left = self._left[request_id] = self._left[request_id] - 1
        if not left:
            del self._left[request_id]
        return RequestOutput(
            request_id=request_id,
            token_ids=[FIRST_TOKEN_ID + left % NUM_TOKEN_IDS],
            finish_reason=None if left else "length",
        )

    def _send(self, outputs: list[RequestOutput]) -> None:
        self._socket.send([self._client, self._encoder.encode(OutputBatch(outputs=outputs))])


if __name__ == "__main__":
    event_loop.run(EngineStub(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])).run())
