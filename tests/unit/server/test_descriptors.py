"""The limit of file descriptors: the log warns before connections are closed without a word."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource

import httpx
import pytest

from hbserve.server import http_protocol


async def test_the_log_warns_once_before_the_limit_is_reached(
    url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_protocol, "_next_warning_s", 0.0)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = max(int(number) for number in os.listdir("/proc/self/fd"))
    address = httpx.URL(url)

    def warnings() -> list[str]:
        return [record.getMessage() for record in caplog.records if "file descriptors" in record.getMessage()]

    async with contextlib.AsyncExitStack() as stack:
        limit = in_use + 4 * http_protocol.SPARE_DESCRIPTORS
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        while not warnings():  # the end is an OSError: both ends of a connection are in this process
            reader, writer = await asyncio.open_connection(address.host, address.port)
            stack.callback(writer.close)
            writer.write(b"GET /version HTTP/1.1\r\nHost: test\r\n\r\n")
            assert b"200" in await reader.readline()
        assert max(int(number) for number in os.listdir("/proc/self/fd")) < limit - 2
        _, writer = await asyncio.open_connection(address.host, address.port)
        stack.callback(writer.close)
    [warning] = warnings()
    assert "raise the limit" in warning
