"""``hbserve store``: what it refuses before it starts anything; the system tests run it."""

from __future__ import annotations

import asyncio
import socket

import pytest

from hbserve.cli.store import main
from hbserve.config import StoreTierConfig
from hbserve.errors import HBServeError, StartupError
from hbserve.kv_tiers.base import BlockName, KVTierContext
from hbserve.kv_tiers.mooncake import MooncakeTier
from hbserve.kv_tiers.mooncake_library import check_answers
from hbserve.kv_tiers.store_service import StoreService, _Part
from tests.support.engines import needs_mooncake
from tests.support.paths import ROOT

DEMO = str(ROOT / "examples" / "models" / "hbserve-demo")


def config(port: int, num_bytes: int = 1 << 24, host: str = "127.0.0.1") -> StoreTierConfig:
    return StoreTierConfig(bytes=num_bytes, master=f"{host}:{port}")


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StartupError, match=rf"kv_cache.store.master: 127.0.0.1:{port}: Address already in use; if"):
            StoreService(config(port))


def test_more_memory_than_the_host_has_is_refused() -> None:
    with pytest.raises(
        StartupError, match=r"kv_cache.store.bytes: this host has \d+ bytes available, not 1125899906842624"
    ):
        StoreService(config(50051, 1 << 50))


def test_less_memory_than_mooncake_can_give_is_refused() -> None:
    with pytest.raises(
        StartupError, match=r"kv_cache.store.bytes: Mooncake gives no less than 16777216 bytes, got 16000000"
    ):
        StoreService(config(50051, 16_000_000))


def test_a_master_whose_name_is_unknown_is_refused() -> None:
    with pytest.raises(HBServeError, match=r"kv_cache.store.master: nowhere.invalid: "):
        StoreService(config(50051, host="nowhere.invalid"))


def test_a_master_that_does_not_answer_is_named_with_what_starts_one() -> None:
    with socket.socket() as taken:  # and does not listen
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(HBServeError, match=rf"the master at 127.0.0.1:{port} does not answer: .* `hbserve store` "):
            check_answers(config(port))


@needs_mooncake
def test_a_system_starts_without_its_master_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        store = MooncakeTier(KVTierContext(config(taken.getsockname()[1]), 64, 1.0))
        assert "does not answer" in caplog.text
        with pytest.raises(HBServeError, match="does not answer"):
            store.contains([BlockName("a")])


async def test_a_part_that_ends_at_its_start_and_ever_again_is_told() -> None:
    with pytest.raises(StartupError, match=r"the part ended with exit code 3 at its start"):
        await _Part("the part", ["/bin/sh", "-c", "exit 3"], "127.0.0.1").start()
    part = _Part("the part", ["/bin/sh", "-c", "kill -9 $$"], "127.0.0.1")
    part._budget._max_restarts = 1
    with pytest.raises(StartupError):
        await part.start()
    with pytest.raises(StartupError, match=r"the part was killed by SIGKILL, \d+ times within ten minutes"):
        await asyncio.wait_for(part.keep_up(), 20.0)


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        ([], "error: kv_cache.store: give {master: host:port, bytes: ...}; hbserve store starts Mooncake\n"),
        (["--kv_cache.store", "{bytes: 5}"], "--kv_cache.store: kv_cache.store.master: give the host:port of the"),
        (["--kv_cache.store", "{master: here, bytes: 5}"], "must be an address like 127.0.0.1:50051 or [::1]:50051"),
        (["--kv_cache.store", "{master: 'a:70000', bytes: 5}"], "the port must be in 1..65535, got 70000"),
        (["--kv_cache.store", "{backend: moncake, bytes: 5}"], "neither a built-in store nor a 'package.module:Class'"),
    ],
)
def test_a_configuration_without_a_usable_store_is_refused(
    flags: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([DEMO, *flags]) == 1
    assert error in capsys.readouterr().err
