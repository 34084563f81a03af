"""The calls of the design documents of disaggregation, in their order, by a program that knows nothing else."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from hbserve.config import load
from hbserve.errors import ConfigError
from hbserve.pd_disagg import LLM, DisaggregatedLLM, KVTransferBackend, PdDisaggConfig
from hbserve.pd_disagg.cpu_scheduler import CpuScheduler
from hbserve.pd_disagg.kv_transfer.base import KVTransferBase
from hbserve.sampling_params import SamplingParams
from tests.support.scheduler_parts import DEMO

PROMPTS = ["What is prefill?", "什么是机器学习"]
SMALL: dict[str, Any] = {"device": "cpu", "num_blocks": 256, "log_level": "WARNING"}

FILE = """
model:
  path: "~/models/demo/"
  tensor_parallel_size: 1

kv_transfer:
  backend: "nccl"
  buffer_size: 1073741824
  ip: "127.0.0.1"
  port: 12345

chunked_prefill:
  enabled: true
  chunk_size: 512

cuda_graph:
  enabled: true
  max_seq_len: 2048

gpu_instances:
  - instance_id: "prefill-0"
    instance_type: "prefill"
    gpu_id: 0
    host: "localhost"
    port: 50051
    kv_rank: 0

  - instance_id: "decode-0"
    instance_type: "decode"
    gpu_id: 1
    host: "localhost"
    port: 50052
    kv_rank: 1
"""


class CustomScheduler(CpuScheduler):
    """Scheduler with a policy of its own."""

    async def _schedule_waiting_requests(self) -> None:
        self.counts["own_policy"] += 1
        await super()._schedule_waiting_requests()


class CustomKVTransfer(KVTransferBase):
    """Transfer of its own, with the two methods that a backend needs."""

    async def send_kv_cache(self, request_id: str, kv_buffer: Any, target_rank: int) -> None:
        """Do nothing."""

    async def receive_kv_cache(self, request_id: str, source_rank: int) -> Any:
        """Do nothing."""


def test_a_file_of_instances_needs_no_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "demo").symlink_to(DEMO)
    path = tmp_path / "pd_disagg_config.yaml"
    path.write_text(FILE)
    config = load(path)
    assert (config.mode, config.served_name) == ("disaggregated", "demo")
    assert [instance.port for instance in config.gpu_instances] == [50051, 50052]
    path.write_text(FILE.split('  - instance_id: "decode-0"')[0])
    with pytest.raises(ConfigError, match="needs at least one decode instance; add one with instance_type: decode"):
        load(path)


@pytest.mark.parametrize("backend", [KVTransferBackend.NCCL, KVTransferBackend.MOONCAKE])
def test_settings_come_before_the_model(backend: KVTransferBackend) -> None:
    config = PdDisaggConfig(kv_transfer_backend=backend, kv_ip="10.0.0.1", kv_port=12346)
    config.chunked_prefill_enabled = True
    config.chunk_size = 256
    config.max_chunk_prefill_tokens = 4096
    config.kv_buffer_size = 512 * 1024 * 1024
    config.cuda_graph_max_seq_len = 1024
    with pytest.raises(ConfigError, match="model_path: give the path"):
        DisaggregatedLLM(config)
    config.model_path = str(DEMO)
    frozen = config.freeze()
    assert (frozen.kv_transfer.backend, frozen.kv_transfer.ip, frozen.kv_transfer.port) == (backend, "10.0.0.1", 12346)
    assert frozen.kv_transfer.buffer_size == 1 << 29


def test_a_backend_of_two_methods_is_complete() -> None:
    assert not inspect.isabstract(CustomKVTransfer)
    config = PdDisaggConfig(str(DEMO), kv_transfer_backend=CustomKVTransfer).freeze()
    assert config.kv_transfer.backend == f"{__name__}:CustomKVTransfer"


async def test_the_asynchronous_system_generates_and_counts() -> None:
    config = PdDisaggConfig(
        model_path=str(DEMO),
        kv_transfer_backend=KVTransferBackend.NCCL,
        chunked_prefill_enabled=True,
        cuda_graph_enabled=True,
        scheduler=CustomScheduler,
        **SMALL,
    )
    llm = DisaggregatedLLM(config)
    try:
        await llm.start()
        results = await llm.generate(PROMPTS, SamplingParams(temperature=0.7, max_tokens=20))
        assert len(results) == len(PROMPTS)
        assert all(isinstance(result["text"], str) for result in results)
        stats = llm.get_system_stats()
        counts = stats["cpu_scheduler"]
        assert (counts["total_requests"], counts["completed_requests"], counts["success_rate"]) == (2, 2, 1.0)
        assert set(stats["gpu_instances"]) == {"prefill-0", "decode-0"}
        for instance in stats["gpu_instances"].values():
            assert (instance["status"], instance["active_requests"]) == ("ready", 0)
    finally:
        await llm.stop()


@pytest.mark.slow
def test_the_synchronous_system_generates() -> None:
    sampling_params = SamplingParams(temperature=0.6, max_tokens=16)
    with LLM(str(DEMO), kv_transfer_backend="nccl", chunked_prefill_enabled=True, **SMALL) as llm:
        outputs = llm.generate(["Hello, pd-disagg HBServe!"], sampling_params)
        assert isinstance(outputs[0]["text"], str)
