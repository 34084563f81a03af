"""The shell around the core, on real sockets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio

from hbserve import PdDisaggConfig
from hbserve.errors import SupersededError
from hbserve.messages.admin import GetStats, Stats
from hbserve.messages.client import ClientMessage, SchedulerReply
from hbserve.messages.worker import InstanceReply, Ping, Superseded
from hbserve.policy.profile_file import BUILT_IN, load_profile
from hbserve.rpc.instance_line import RpcServer
from hbserve.scheduler.core_io import Start
from hbserve.scheduler.process import load_profile_for
from hbserve.scheduler.scheduler import CpuScheduler
from hbserve.scheduler.shell import SchedulerShell
from tests.support.scheduler_parts import DEMO
from tests.unit.scheduler.test_core import HELLO

DEADLINE_S = 30.0
LLAMA = BUILT_IN.with_name("llama_3_1_8b_h200.json")


def test_the_configured_profile_comes_before_the_one_that_was_found(tmp_path: Path) -> None:
    def loaded(found: Path | None, **arguments: Any) -> str | None:
        config = PdDisaggConfig.from_arguments(str(DEMO), mode="semi_pd", device="cpu", **arguments).freeze()
        profile = load_profile_for(config, None if found is None else str(found))
        return None if profile is None else profile.model

    slo = {"ttft_target_ms": 100.0, "tpot_target_ms": 20.0, "profile": str(LLAMA)}
    assert loaded(None) is None
    assert loaded(BUILT_IN) == load_profile(None).model
    assert loaded(BUILT_IN, slo=slo) == load_profile(LLAMA).model
    assert loaded(tmp_path / "deleted meanwhile") is None


class Client:
    """A client on a socket of its own."""

    def __init__(self, context: zmq.asyncio.Context, address: str) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.connect(address)

    async def ask(self, message: ClientMessage) -> SchedulerReply:
        await self.socket.send(msgspec.msgpack.encode(message))
        reply: SchedulerReply = msgspec.msgpack.decode(await self.socket.recv(), type=SchedulerReply)
        return reply


@asynccontextmanager
async def running(
    scheduler_class: type[CpuScheduler], folder: Path
) -> AsyncIterator[tuple[SchedulerShell, asyncio.Task[None], Client]]:
    config = PdDisaggConfig.from_arguments(str(DEMO), mode="unified", device="cpu").freeze()
    start = Start(now=time.monotonic(), time_ns=time.time_ns())
    scheduler = scheduler_class(config, {"unified-0": f"ipc://{folder}/worker"}, start)
    shell = SchedulerShell(scheduler, config, f"ipc://{folder}/scheduler")
    serving = asyncio.create_task(shell.run())
    async with asyncio.timeout(DEADLINE_S):
        with zmq.asyncio.Context() as context:
            client = Client(context, f"ipc://{folder}/scheduler")
            yield shell, serving, client
            client.socket.close(linger=0)
        shell.stop()
        await asyncio.wait([serving])


class Waits(CpuScheduler):
    """A user's policy that waits for something in every step."""

    async def _schedule_waiting_requests(self) -> None:
        await asyncio.sleep(0.001)
        self.counts["refused"] += 1
        await super()._schedule_waiting_requests()


async def test_a_policy_may_wait(short_path: Path) -> None:
    async with running(Waits, short_path) as (_, _, client):
        await client.ask(GetStats(query_id=1))  # answered after a step
        reply = await client.ask(GetStats(query_id=2))
        assert isinstance(reply, Stats)
        assert reply.stats["cpu_scheduler"]["refused_requests"] >= 1


async def test_an_error_of_the_core_ends_the_shell_with_that_error(short_path: Path) -> None:
    """Here a worker obeys this scheduler first, and then a newer one."""
    server = RpcServer(f"ipc://{short_path}/worker")
    async with running(CpuScheduler, short_path) as (_, serving, _):
        replies: list[InstanceReply] = [HELLO, Superseded(scheduler_epoch=1 << 62)]
        while not serving.done():
            receiving = asyncio.create_task(server.receive())
            await asyncio.wait([serving, receiving], return_when=asyncio.FIRST_COMPLETED)
            if not receiving.done():
                receiving.cancel()
                break
            peer, command = receiving.result()
            assert isinstance(command, Ping)
            server.answer_to(peer)
            server.send(replies[command.known_epoch != 0])
        with pytest.raises(SupersededError, match="obeys a scheduler that was started later"):
            await serving
    server.close()
