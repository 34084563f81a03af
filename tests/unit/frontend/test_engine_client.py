"""The client's line to schedulers that end, hang and come back, on a real socket with scripted schedulers."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from hbserve import SamplingParams
from hbserve.config import InstanceRole, RpcConfig
from hbserve.errors import EngineDeadError, HBServeError, RequestFailedError, SchedulerRestartingError
from hbserve.frontend.engine_client import EngineClient
from hbserve.frontend.scheduler_line import NEXT_STATES, LineState
from hbserve.messages.client import AddRequest, RequestOutput
from tests.support.http_server import until
from tests.support.scripted_scheduler import DEADLINE_S, ScriptedScheduler, output


@asynccontextmanager
async def connected(folder: Path, **deadlines: Any) -> AsyncIterator[tuple[EngineClient, list[str]]]:
    """A client, and what it has said of silent schedulers."""
    silences: list[str] = []
    rpc = RpcConfig(heartbeat_interval_s=0.05, **deadlines)
    client = EngineClient(f"ipc://{folder}/scheduler", rpc, on_silent=silences.append)
    await client.connect()
    try:
        yield client, silences
    finally:
        await client.close()


def request(name: str) -> AddRequest:
    sampling = SamplingParams(max_tokens=50, seed=1)
    return AddRequest(request_id=name, prompt_token_ids=[1, 2], end_token_ids=[], sampling=sampling)


async def three_tokens_of_five(request: AddRequest) -> AsyncIterator[RequestOutput]:
    """Go on to the fifth token; the first scheduler comes to the third only."""
    begin = 0 if request.resumed is None else len(request.resumed.token_ids)
    for token in range(begin, 5 if begin else 3):
        yield output(request, 50 + token, finish_reason="length" if token == 4 else None)


def tokens(outputs: list[RequestOutput | HBServeError]) -> list[int]:
    return [token for output in outputs if isinstance(output, RequestOutput) for token in output.token_ids]


def test_the_states_of_a_line(tmp_path: Path) -> None:
    assert NEXT_STATES.keys() == set(LineState)
    assert not NEXT_STATES[LineState.DEAD] - {LineState.DEAD}
    client = EngineClient(f"ipc://{tmp_path}/scheduler")
    for state, following in itertools.product(LineState, LineState):
        client._line.state = state
        if following in NEXT_STATES[state]:
            client._line.enter(following)
            assert client._line.state is following
        else:
            with pytest.raises(AssertionError, match=f"{state} -> {following}"):
                client._line.enter(following)


async def test_requests_and_questions_go_on_at_the_next_scheduler(tmp_path: Path) -> None:
    async with connected(tmp_path) as (client, silences):
        outputs: list[RequestOutput | HBServeError] = []
        aborted: list[RequestOutput | HBServeError] = []
        async with ScriptedScheduler(tmp_path, epoch=1) as first:
            first.script = three_tokens_of_five
            first.stats = None  # no answer
            await client.wait_ready(DEADLINE_S)
            client.open(request("a"), outputs.append)
            client.open(request("aborted"), aborted.append)
            await until(lambda: len(tokens(outputs)) == 3 and len(tokens(aborted)) == 3)
            question = asyncio.create_task(client.stats(DEADLINE_S))
            change = asyncio.create_task(client.set_role("decode-0", InstanceRole.PREFILL))
            await first.wait_for(lambda: first.num_messages > 3)
        with pytest.raises(SchedulerRestartingError, match="unknown what has changed"):
            await change
        assert "has ended" in (client.restarting or "")
        with pytest.raises(SchedulerRestartingError):
            await client.stats(0.01)
        client.abort("aborted", "stop")
        client.report_event("lost", "decode-0", "meanwhile")
        await until(lambda: len(aborted) == 4)
        async with ScriptedScheduler(tmp_path, epoch=2) as second:
            second.script = three_tokens_of_five
            await until(lambda: len(tokens(outputs)) == 5)
            assert (await question)["gpu_instances"]
            assert client.restarting is None
            assert [request.request_id for request in second.requests] == ["a"]
            await second.wait_for(lambda: len(second.events) == 1)
        assert tokens(outputs) == [50, 51, 52, 53, 54]
        end = aborted[-1]
        assert isinstance(end, RequestOutput)
        assert (end.token_ids, end.finish_reason) == ([], "stop")
        assert client.num_open == 0
        assert silences == []


async def test_a_silent_scheduler_is_given_up_although_its_connection_stands(tmp_path: Path) -> None:
    async with (
        ScriptedScheduler(tmp_path, epoch=1) as scheduler,
        connected(tmp_path, heartbeat_timeout_s=0.5) as (client, silences),
    ):
        scheduler.script = three_tokens_of_five
        await client.wait_ready(DEADLINE_S)
        outputs: list[RequestOutput | HBServeError] = []
        client.open(request("a"), outputs.append)
        await until(lambda: len(tokens(outputs)) == 3)
        scheduler.is_silent = True
        await until(lambda: bool(silences))
        assert "gave no sign of life" in silences[0]
        scheduler.is_silent = False  # it was the network: the same scheduler goes on, over another connection
        await until(lambda: len(tokens(outputs)) == 5)
        assert tokens(outputs) == [50, 51, 52, 53, 54]


async def test_a_scheduler_that_does_not_come_back_is_dead(tmp_path: Path) -> None:
    async with connected(tmp_path, recovery_timeout_s=1.0) as (client, _):
        outputs: list[RequestOutput | HBServeError] = []
        async with ScriptedScheduler(tmp_path, epoch=1) as first:
            first.script = three_tokens_of_five
            await client.wait_ready(DEADLINE_S)
            client.open(request("a"), outputs.append)
            await until(lambda: len(tokens(outputs)) == 3)
        await until(lambda: client.dead is not None)
        assert isinstance(outputs[-1], EngineDeadError)
        assert "did not come back within 1 s" in str(client.dead)
        with pytest.raises(EngineDeadError):
            client.open(request("b"), outputs.append)


async def test_requests_fail_if_no_instance_comes_to_the_next_scheduler(tmp_path: Path) -> None:
    async with connected(tmp_path, recovery_timeout_s=1.0) as (client, _):
        outputs: list[RequestOutput | HBServeError] = []
        async with ScriptedScheduler(tmp_path, epoch=1) as first:
            first.script = three_tokens_of_five
            await client.wait_ready(DEADLINE_S)
            client.open(request("a"), outputs.append)
            await until(lambda: len(tokens(outputs)) == 3)
        async with ScriptedScheduler(tmp_path, epoch=2, takes_requests=False):
            await until(lambda: len(outputs) == 4)
            assert isinstance(outputs[-1], RequestFailedError)
            assert client.dead is None  # an instance may still come
