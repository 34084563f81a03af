"""The flat configuration that Python users write."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import msgspec

from hbserve.config.sections import Config
from hbserve.config.semi_pd import nearest
from hbserve.config.validation import from_dict
from hbserve.errors import ConfigError


class KVTransferBackend(StrEnum):
    """The built-in ways to move KV between instances."""

    NCCL = "nccl"
    MOONCAKE = "mooncake"


_KEYS = {
    # field -> key of the Config it becomes
    "mode": "mode",
    "launcher": "launcher",
    "model_path": "model.path",
    "served_name": "model.served_name",
    "tokenizer_path": "model.tokenizer_path",
    "device": "model.device",
    "dtype": "model.dtype",
    "load_format": "model.load_format",
    "tensor_parallel_size": "model.tensor_parallel_size",
    "max_model_len": "model.max_model_len",
    "attention_backend": "model.attention_backend",
    "seed": "model.seed",
    "max_num_seqs": "performance.max_num_seqs",
    "max_num_batched_tokens": "performance.max_num_batched_tokens",
    "block_size": "performance.block_size",
    "num_blocks": "performance.num_blocks",
    "memory_fraction": "performance.memory_fraction",
    "enable_prefix_caching": "performance.enable_prefix_caching",
    "decode_headroom_tokens": "performance.decode_headroom_tokens",
    "placement": "performance.placement",
    "pipeline_depth": "performance.pipeline_depth",
    "max_waiting_requests": "performance.max_waiting_requests",
    "scheduler": "performance.scheduler",
    "scheduling_policy": "scheduler.policy",
    "ttft_target_ms": "scheduler.ttft_ms",
    "tpot_target_ms": "scheduler.tpot_ms",
    "max_queue_s": "scheduler.max_queue_s",
    "kv_transfer_backend": "kv_transfer.backend",
    "kv_buffer_size": "kv_transfer.buffer_size",
    "kv_ip": "kv_transfer.ip",
    "kv_port": "kv_transfer.port",
    "kv_timeout_s": "kv_transfer.timeout_s",
    "local_prefill_tokens": "kv_transfer.local_prefill_tokens",
    "kv_layer_group_bytes": "kv_transfer.layer_group_bytes",
    "kv_verify": "kv_transfer.verify",
    "kv_mooncake_protocol": "kv_transfer.mooncake_protocol",
    "chunked_prefill_enabled": "chunked_prefill.enabled",
    "chunk_size": "chunked_prefill.chunk_size",
    "max_chunk_prefill_tokens": "chunked_prefill.max_chunk_prefill_tokens",
    "cuda_graph_enabled": "cuda_graph.enabled",
    "cuda_graph_max_seq_len": "cuda_graph.max_seq_len",
    "prefill_percentage": "semi_pd.prefill_percentage",
    "decode_percentage": "semi_pd.decode_percentage",
    "mixed": "semi_pd.mixed",
    "ladder": "semi_pd.ladder",
    "num_sleepers": "semi_pd.num_sleepers",
    "slo": "semi_pd.slo",
    "gpu_instances": "gpu_instances",
    "log_level": "logging.level",
    "otlp_endpoint": "telemetry.otlp_endpoint",
    "start_timeout_s": "rpc.start_timeout_s",
    "heartbeat_timeout_s": "rpc.heartbeat_timeout_s",
    "recovery_timeout_s": "rpc.recovery_timeout_s",
    "max_restarts": "rpc.max_restarts",
}


@dataclass
class PdDisaggConfig:
    """Settings of a system as flat, changeable fields; `freeze` validates them into a `Config`.

    Each field is a key of the YAML file under a flat name; see the sections in `hbserve.config`
    for what they mean. A field left at None takes that section's default.
    """

    model_path: str
    mode: str = "disaggregated"
    launcher: str | None = None
    served_name: str | None = None
    tokenizer_path: str | None = None
    device: str | None = None
    dtype: str | None = None
    load_format: str | None = None
    tensor_parallel_size: int | None = None
    max_model_len: int | None = None
    attention_backend: str | None = None
    seed: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    block_size: int | None = None
    num_blocks: int | None = None
    memory_fraction: float | None = None
    enable_prefix_caching: bool | None = None
    decode_headroom_tokens: int | None = None
    placement: str | None = None
    pipeline_depth: int | None = None
    max_waiting_requests: int | None = None
    scheduler: str | None = None
    scheduling_policy: str | None = None
    ttft_target_ms: float | None = None
    tpot_target_ms: float | None = None
    max_queue_s: float | None = None
    kv_transfer_backend: KVTransferBackend | str | None = None
    kv_buffer_size: int | None = None
    kv_ip: str | None = None
    kv_port: int | None = None
    kv_timeout_s: float | None = None
    local_prefill_tokens: int | None = None
    kv_layer_group_bytes: int | None = None
    kv_verify: bool | None = None
    kv_mooncake_protocol: str | None = None
    chunked_prefill_enabled: bool | None = None
    chunk_size: int | None = None
    max_chunk_prefill_tokens: int | None = None
    cuda_graph_enabled: bool | None = None
    cuda_graph_max_seq_len: int | None = None
    prefill_percentage: int | None = None
    decode_percentage: int | None = None
    mixed: bool | None = None
    ladder: dict[str, list[int]] | None = None
    num_sleepers: int | None = None
    slo: dict[str, Any] | None = None
    gpu_instances: list[dict[str, Any]] | None = None
    log_level: str | None = None
    otlp_endpoint: str | None = None
    start_timeout_s: float | None = None
    heartbeat_timeout_s: float | None = None
    recovery_timeout_s: float | None = None
    max_restarts: int | None = None

    @classmethod
    def from_arguments(cls, model_path: str, **arguments: Any) -> PdDisaggConfig:
        """A configuration from keyword arguments.

        Raises:
            TypeError: naming an unknown argument and the nearest valid one.
        """
        valid = [field.name for field in dataclasses.fields(cls)]
        for name in arguments:
            if name not in valid:
                raise TypeError(f"unknown argument {name!r}{nearest(name, valid)}")
        return cls(model_path, **arguments)

    def freeze(self) -> Config:
        """The one configuration that every process gets.

        Raises:
            ConfigError: naming the field at fault.
        """
        document: dict[str, Any] = {}
        for field, key in _KEYS.items():
            value = getattr(self, field)
            if value is None:
                continue
            section, _, name = key.partition(".")
            if name:
                document.setdefault(section, {})[name] = msgspec.to_builtins(value)
            else:
                document[section] = msgspec.to_builtins(value)
        try:
            return from_dict(document)
        except ConfigError as error:
            flat = {key: field for field, key in _KEYS.items()}
            if error.key not in flat:
                raise
            name = flat[error.key]
            raise ConfigError(f"{name}: {str(error).removeprefix(error.key + ': ')}", name) from None
