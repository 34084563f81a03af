"""Sockets that any process of the host can reach: no message of any shape ends a part, or keeps it from its work."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from hbserve import DisaggregatedLLM, SamplingParams
from hbserve.config import InstanceRole, from_dict
from hbserve.messages.admin import GetStats, GetWindowMetrics, RemoveInstance, SetRole
from hbserve.messages.client import AbortRequest, AddRequest, Resumed, SubscribeReady
from hbserve.messages.membership import Join
from hbserve.messages.supervisor import SetWorkers, WorkerSpec
from hbserve.messages.transfer import OpenLink, Peer
from hbserve.messages.worker import PlanRow, StepLost, StepPlan, StepRef
from hbserve.rpc.async_socket import MAX_MESSAGE_BYTES, MAX_REQUEST_BYTES
from hbserve.rpc.cluster_key import ClusterKey
from hbserve.rpc.instance_line import RpcServer
from tests.support.engines import assert_no_leaks, greedy_reference, random_prompt
from tests.support.model_zoo import save_model
from tests.support.ports import free_ports

DEADLINE_S = 60.0
SAMPLING = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


def messages() -> list[Any]:
    """Real messages of both sockets, with values that no client of ours would send."""
    nan, huge = float("nan"), 10**18
    plan = StepPlan(epoch=1, step_id=huge, rows=[], new_sequences=[], sends=[])
    row = PlanRow(slot=-5, start=-1, num_tokens=huge, token_ids=[-1], new_block_ids=[huge], sample=True)
    worker = WorkerSpec(worker_id="w", role=InstanceRole.DECODE, percentage=-1, address="nonsense")
    shares: dict[str, Any] = {"prefill_percentage": -1, "decode_percentage": 1000}
    return [
        AddRequest(request_id="", prompt_token_ids=[-1, huge], end_token_ids=[-huge], sampling=SamplingParams()),
        AddRequest(request_id="\n", prompt_token_ids=[], end_token_ids=[], sampling=SAMPLING),
        AddRequest(request_id="r" * 100_000, prompt_token_ids=[1], end_token_ids=[-1, huge], sampling=SAMPLING),
        AddRequest(request_id="seed", prompt_token_ids=[1], end_token_ids=[], sampling=SamplingParams(max_tokens=huge)),
        *(
            AddRequest(
                request_id=f"resumed-{number}",
                prompt_token_ids=[1, 2],
                end_token_ids=[],
                sampling=SAMPLING,
                age_s=age_s,
                resumed=Resumed(token_ids=tokens, num_scored=num_scored, first_token_age_s=first_token_age_s),
            )
            for number, (tokens, num_scored, age_s, first_token_age_s) in enumerate(
                [([3], 0, 1e9, 1e9), ([huge], -huge, nan, -1.0), ([3] * 500, 1, 0.0, 1.0), ([], huge, 1.0, None)]
            )
        ),
        *(
            AddRequest(request_id=str(number), prompt_token_ids=[1], end_token_ids=[], sampling=sampling)
            for number, sampling in enumerate(
                (
                    SamplingParams(max_tokens=4, stop_token_ids=[huge]),
                    SamplingParams(max_tokens=4, logit_bias={10**6: 1.0}),
                    SamplingParams(max_tokens=4, logit_bias={3: 100.0}, min_tokens=4, stop_token_ids=[3]),
                    SamplingParams(max_tokens=4, seed=-(2**63), temperature=1e-30, top_k=10**9),
                    SamplingParams(max_tokens=4, grammar="start: \x00("),
                    SamplingParams(max_tokens=4, ttft_ms=1e-300, tpot_ms=1e15),
                )
            )
        ),
        AbortRequest(request_id="unknown", finish_reason="\x1b[2J"),
        *(SubscribeReady(deadline_s=value) for value in (nan, -1.0, 1e308)),
        *(GetWindowMetrics(query_id=huge, seconds=value) for value in (nan, -1e308, 1e308, 0.0)),
        GetStats(query_id=-huge, recent=True),
        SetRole(query_id=1, instance_id="nobody", role=InstanceRole.DECODE, deadline_s=nan),
        SetRole(query_id=1, instance_id="unified-0", role=InstanceRole.SEMI_PD, deadline_s=nan),
        RemoveInstance(query_id=1, instance_id="\x00", deadline_s=-1.0),
        *(
            Join(instance_id=name, role=role, address=address, kv_rank=rank, num_ranks=ranks)
            for name in ("", "unified-0", "new\n")
            for role in InstanceRole
            for address, rank, ranks in (
                ("tcp://127.0.0.1:99999", None, None),
                ("tcp://nonsense host:1", -1, 1),
                ("ipc:///etc/passwd", 0, 0),
                ("", huge, -huge),
            )
        ),
        SetWorkers(instance_id="unified-0", arena_epoch=-1, workers=[worker], draining=[worker], **shares),
        plan,
        msgspec.structs.replace(plan, rows=[row]),
        StepLost(step=StepRef(cell=huge, step_id=-1)),
        OpenLink(source_id="x", link_epoch=-1, sources=[Peer(rank=-1, epoch=0, endpoint="::")]),
    ]


def payloads(chance: random.Random) -> Iterator[list[bytes]]:
    """Some hundred messages as their frames."""
    known = [msgspec.msgpack.encode(message) for message in messages()]
    yield from ([payload] for payload in known)
    for number in range(200):
        payload = bytearray(chance.choice(known))
        for _ in range(chance.randint(1, 4)):
            payload[chance.randrange(len(payload))] = chance.randrange(256)
        yield [bytes(payload[: chance.randint(0, len(payload))] if number % 3 == 0 else payload)]
    yield from ([chance.randbytes(chance.randint(0, 300))] for _ in range(150))
    for count in (2, 3, 7, 8, 9, 12, 100, 5000):
        yield [b""] * count
        yield [chance.choice(known)] * count
    lengths = [struct.pack(">BI", code, 0xFFFFFFFF) for code in (0xC6, 0xC9, 0xDB, 0xDD, 0xDF)]
    yield from ([head + known[0]] for head in lengths)
    yield from ([b"\x92\xa8GetStats" + head] for head in lengths)
    yield from ([one * 200_000] for one in (b"\x91", b"\x81\xa1x", b"\xc0", b"\x92\xa4Ping"))
    yield [b"\x00" * 8 * 2**20]


def raw_streams(chance: random.Random) -> Iterator[bytes]:
    """Bytes on a connection that does not speak ZeroMQ, or stops to."""
    greeting = b"\xff" + b"\x00" * 8 + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\x00") + b"\x00" * 32
    ready = b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
    yield from (b"", b"\n", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01" + b"\x00" * 500, greeting[:11])
    yield from (greeting, greeting + ready[:7], greeting + b"\x06" + b"\xff" * 8, greeting + chance.randbytes(200))
    for flags in range(8):
        yield greeting + ready + bytes([flags, 3]) + b"abc"
    yield greeting + ready + b"\x01\x00" + b"\x01\x01x" + b"\x00\x00"  # two frames and an empty one
    yield greeting + ready + b"\x02" + (2**40).to_bytes(8, "big") + b"x" * 1000
    yield from (greeting + ready + chance.randbytes(300) for _ in range(30))
    yield from (chance.randbytes(200) for _ in range(30))


def is_closed(port: int, size: int, with_key: bool = False) -> bool:
    """Announce a frame and send its beginning; return whether the listener closes the connection."""
    mechanism = b"CURVE" if with_key else b"NULL"
    greeting = b"\xff" + b"\x00" * 8 + b"\x7f\x03\x00" + mechanism.ljust(20, b"\x00") + b"\x00" * 32
    ready = b"" if with_key else b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
    frame = b"\x06" if with_key else b"\x02"
    with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S) as raw:
        raw.sendall(greeting + ready + frame + size.to_bytes(8, "big") + b"x" * 1000)
        try:
            while raw.recv(4096):
                pass
        except ConnectionError:
            pass
        return True


@pytest.fixture
async def system(tmp_path: Path) -> AsyncIterator[tuple[DisaggregatedLLM, Any, list[int]]]:
    model = save_model(tmp_path / "model", "qwen3")
    ports = free_ports(2)
    config = {
        "mode": "unified",
        "model": {"path": str(tmp_path / "model"), "device": "cpu", "dtype": "float32"},
        "rpc": {"port": ports[0]},
        "performance": {"num_blocks": 64, "block_size": 4},
        "gpu_instances": [{"instance_id": "unified-0", "instance_type": "unified", "port": ports[1], "num_threads": 1}],
    }
    async with DisaggregatedLLM(from_dict(config)) as llm:
        yield llm, model, ports


async def test_no_message_ends_the_scheduler_or_an_instance(system: Any) -> None:
    llm, model, ports = system
    prompt = random_prompt(30, 1)
    expected = greedy_reference(model, prompt, SAMPLING.max_tokens or 0)
    before = llm.get_system_stats()["gpu_instances"]["unified-0"]["pid"]

    async def ask() -> None:
        async with asyncio.timeout(DEADLINE_S):
            [output] = await llm.generate([prompt], SAMPLING)
        assert output["token_ids"] == expected

    await ask()
    chance = random.Random(7)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        for port in ports:
            for kind in (zmq.DEALER, zmq.REQ, zmq.ROUTER):
                peer = context.socket(kind)
                peer.linger = 0
                peer.connect(f"tcp://127.0.0.1:{port}")
                if kind != zmq.DEALER:
                    continue
                for number, frames in enumerate(payloads(chance)):
                    await asyncio.to_thread(peer.send_multipart, frames)
                    if number % 100 == 0:
                        await ask()
                assert await asyncio.to_thread(peer.poll, 0) is not None
            for stream in raw_streams(chance):
                with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S) as raw:
                    raw.sendall(stream)
            await ask()
        assert await asyncio.to_thread(is_closed, ports[0], MAX_REQUEST_BYTES + 1)
    finally:
        context.destroy(linger=0)
    await ask()
    instance = llm.get_system_stats()["gpu_instances"]["unified-0"]
    assert (instance["pid"], instance["status"]) == (before, "ready")
    assert llm.client.dead is None
    await asyncio.to_thread(assert_no_leaks, llm)


@pytest.mark.parametrize("with_key", [False, True], ids=["loopback", "before the login"])
async def test_a_message_over_the_limit_closes_its_connection(with_key: bool) -> None:
    """The size counts as soon as it is announced, so a connection cannot fill the memory of the listener."""
    port = free_ports(1)[0]
    server = RpcServer(f"tcp://127.0.0.1:{port}", ClusterKey.generate() if with_key else None)
    receiving = asyncio.create_task(server.receive())
    assert await asyncio.to_thread(is_closed, port, MAX_MESSAGE_BYTES + 1, with_key)
    assert not receiving.done()
    receiving.cancel()
    await asyncio.gather(receiving, return_exceptions=True)
    server.close()
