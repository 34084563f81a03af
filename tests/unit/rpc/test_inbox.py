"""What arrives on a socket that is no message, or too much of one."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
import zmq

from hbserve.messages.client import AddRequest, ClientMessage
from hbserve.rpc.async_socket import MAX_MESSAGE_BYTES, AsyncSocket
from hbserve.rpc.inbox import Inbox
from hbserve.rpc.instance_line import RpcClient
from hbserve.sampling_params import SamplingParams

DEADLINE_S = 20.0


async def test_a_report_quotes_little_of_a_message_that_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    sampling = SamplingParams(seed=1, max_tokens=1, stop_token_ids=[1])
    request = AddRequest(request_id="x", prompt_token_ids=[1], end_token_ids=[], sampling=sampling)
    encoded = msgspec.msgpack.encode(request)
    ids = msgspec.msgpack.encode([1])
    assert encoded.count(b"stop_token_ids" + ids) == 1
    bad = encoded.replace(b"stop_token_ids" + ids, b"stop_token_ids" + msgspec.msgpack.encode([-1] * 100_000))
    with zmq.Context() as context:
        ends = [AsyncSocket(context.socket(zmq.PAIR)) for _ in range(2)]
        ends[0].socket.bind("inproc://inbox")
        ends[1].socket.connect("inproc://inbox")
        reports: list[str] = []
        inbox: Inbox[ClientMessage] = Inbox(
            ends[0], ClientMessage, "a client", lambda sender, what: reports.append(what)
        )
        for frame in (bad, encoded):
            ends[1].send([frame])
        async with asyncio.timeout(DEADLINE_S):
            assert (await inbox.receive())[1] == request
        for end in ends:
            end.close()
    [report] = reports
    assert "stop_token_ids must not be negative" in report
    assert max(len(report), len(caplog.text)) < 1000


async def test_a_scheduler_takes_no_message_over_the_limit_from_an_instance_either() -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as instance:
        instance.linger = 0
        port = instance.bind_to_random_port("tcp://127.0.0.1")
        client: RpcClient[ClientMessage] = RpcClient(context, f"tcp://127.0.0.1:{port}", receives=ClientMessage)
        connected = asyncio.Event()
        client.on_connected = connected.set
        watching = asyncio.create_task(client.wait_disconnected())
        async with asyncio.timeout(DEADLINE_S):
            await connected.wait()
            client.send_encoded(b"hello")
            identity, _ = await asyncio.to_thread(instance.recv_multipart)
            instance.send_multipart([identity, bytes(MAX_MESSAGE_BYTES + 1)])
            await watching
        client.close()
