"""Ray as the launcher, on a cluster of several raylets on this machine."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hbserve import DisaggregatedLLM, SamplingParams
from hbserve.config import from_dict
from hbserve.errors import ConfigError
from tests.support.engines import assert_no_leaks, greedy_reference, random_prompt
from tests.support.model_zoo import save_model
from tests.support.ports import free_ports

GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
DEADLINE_S = 90.0


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two hosts, as far as Ray knows, with room for one instance each, on the loopback interface alone."""
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # what makes Ray take 127.0.0.1 as its address
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_enable_worker_prestart", "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # A short name, because paths of sockets are limited; Ray leaves its logs there.
    with tempfile.TemporaryDirectory(prefix="hbr", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        (Path(folder) / "ray").mkdir()
        pytest.importorskip("ray", reason="Ray is not installed: pip install 'hbserve[ray]'")
        from ray.cluster_utils import Cluster

        options = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "object_store_memory": 80 << 20}
        made = Cluster()
        try:
            made.add_node(**options, include_dashboard=False)
            made.add_node(**options)
            monkeypatch.setenv("RAY_ADDRESS", made.address)
            yield made
        finally:
            made.shutdown()


def document(model: Path, **instance: Any) -> dict[str, Any]:
    return {
        "mode": "disaggregated",
        "launcher": "ray",
        "model": {"path": str(model), "device": "cpu", "dtype": "float32", "max_model_len": 256},
        "performance": {"num_blocks": 256},
        "rpc": {"port": free_ports(1)[0], "start_timeout_s": 60.0},
        "logging": {"level": "ERROR"},
        "gpu_instances": [
            {"instance_id": f"{role}-0", "instance_type": role, "num_threads": 1, **instance}
            for role in ("prefill", "decode")
        ],
    }


def parent_of(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("PPid:")[2].split()[0])


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def test_ray_places_instances_and_starts_them_again(tmp_path: Path, cluster: Any) -> None:
    model = save_model(tmp_path, "qwen3")
    prompts = [random_prompt(40 + 19 * index, seed=index) for index in range(8)]
    expected = [greedy_reference(model, prompt, 40) for prompt in prompts]
    async with DisaggregatedLLM(from_dict(document(tmp_path))) as llm:

        async def answer() -> None:
            outputs = await asyncio.wait_for(llm.generate(prompts, GREEDY), DEADLINE_S)
            assert [output["token_ids"] for output in outputs] == expected

        async def decode_instance() -> dict[str, Any]:
            instance: dict[str, Any] = (await llm.client.stats())["gpu_instances"]["decode-0"]
            return instance

        before = (await decode_instance())["pid"]
        work = asyncio.create_task(answer())
        while not (await decode_instance())["active_requests"]:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        os.kill(parent_of(before), signal.SIGKILL)
        await work  # it may have ended before the worker noticed that its parent is gone
        async with asyncio.timeout(DEADLINE_S):
            while (after := (await decode_instance()).get("pid")) in {before, None}:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        await answer()
        await asyncio.to_thread(assert_no_leaks, llm)
    assert not is_alive(after)


def test_what_ray_cannot_do_is_said(tmp_path: Path) -> None:
    save_model(tmp_path, "qwen3")
    with pytest.raises(ConfigError, match=r"gpu_instances\[0\].bind: Ray decides"):
        from_dict(document(tmp_path, bind="127.0.0.1"))
    no_port = document(tmp_path)
    del no_port["rpc"]["port"]
    with pytest.raises(ConfigError, match=r"set rpc\.port"):
        from_dict(no_port)
