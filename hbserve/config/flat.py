"""Flat configuration that Python users write."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import msgspec

from hbserve.config.fields import Section
from hbserve.config.foreign_names import unknown_name
from hbserve.config.sections import Config
from hbserve.config.validation import from_dict
from hbserve.errors import ConfigError
from hbserve.hints import shown
from hbserve.import_path import path_of_class


class KVTransferBackend(StrEnum):
    """Built-in ways to move KV between instances."""

    NCCL = "nccl"
    MOONCAKE = "mooncake"


@dataclass
class PdDisaggConfig:
    """Settings of a system as flat, changeable fields; `freeze` validates them into a `Config`.

    Each field is a key of the YAML file under a flat name; the sections in `hbserve.config` explain the keys.
    A field that is None takes its section's default. ``mode`` then follows from ``gpu_instances``, and is
    ``disaggregated`` without these; ``auto`` chooses it, and latency targets, when the system starts. ``model_path``
    must be given when the configuration is used. The fields are listed here, because only a written list gives type
    checkers and editors their names and types; `KEYS` follows from the sections by a rule.
    """

    model_path: str | os.PathLike[str] | None = None
    mode: str | None = None
    launcher: str | None = None
    served_name: str | None = None
    tokenizer_path: str | None = None
    device: str | None = None
    dtype: str | None = None
    generation_config: str | None = None
    load_format: str | None = None
    tensor_parallel_size: int | None = None
    dummy_expert_skew: float | None = None
    expert_parallel: bool | None = None
    max_model_len: int | None = None
    attention_backend: str | None = None
    quantization: str | None = None
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
    scheduler: str | type[Any] | None = None
    scheduling_policy: str | None = None
    ttft_target_ms: float | None = None
    tpot_target_ms: float | None = None
    max_queue_s: float | None = None
    kv_cache_dtype: str | None = None
    kv_transfer_backend: KVTransferBackend | str | type[Any] | None = None
    kv_buffer_size: int | None = None
    kv_ip: str | None = None
    kv_port: int | None = None
    kv_timeout_s: float | None = None
    local_prefill_tokens: int | None = None
    kv_layer_group_bytes: int | None = None
    kv_verify: bool | None = None
    kv_mooncake_protocol: str | None = None
    host_bytes: int | None = None
    disk: dict[str, Any] | None = None
    store: dict[str, Any] | None = None
    chunked_prefill_enabled: bool | None = None
    chunk_size: int | None = None
    max_chunk_prefill_tokens: int | None = None
    cuda_graph_enabled: bool | None = None
    cuda_graph_max_seq_len: int | None = None
    speculation_method: str | None = None
    speculation_model: str | os.PathLike[str] | None = None
    max_draft_tokens: int | None = None
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

    if not TYPE_CHECKING:  # type checkers would take a class with __setattr__ to have every attribute

        def __new__(cls, *_: Any, **fields: Any) -> PdDisaggConfig:
            cls._check_names(fields)
            return super().__new__(cls)

        def __setattr__(self, name: str, value: Any) -> None:
            if name not in KEYS:
                hint = unknown_name(name, list(KEYS), _in_python)
                raise AttributeError(f"PdDisaggConfig has no field {shown(name)}{hint}")
            super().__setattr__(name, value)

    @classmethod
    def from_arguments(cls, model_path: str | os.PathLike[str], **arguments: Any) -> PdDisaggConfig:
        """Make a configuration from keyword arguments.

        Raises:
            TypeError: naming an unknown argument and the nearest valid one.
        """
        cls._check_names(arguments)
        return cls(model_path, **arguments)

    @staticmethod
    def _check_names(arguments: Iterable[str]) -> None:
        for name in arguments:
            if name not in KEYS:
                raise TypeError(f"unknown argument {shown(name)}{unknown_name(name, list(KEYS), _in_python)}")

    def freeze(self) -> Config:
        """Return the configuration that every process gets.

        Raises:
            ConfigError: naming the field at fault.
        """
        if self.model_path is None:
            raise ConfigError("model_path: give the path of the model's folder", "model_path")
        document: dict[str, Any] = {} if self.gpu_instances else {"mode": "disaggregated"}
        for field, key in KEYS.items():
            value = getattr(self, field)
            if value is not None:
                section, _, name = key.rpartition(".")
                values = document.setdefault(section, {}) if section else document
                values[name] = _plain(field, value)
        if document.get("mode") != "auto":
            document.setdefault("scheduler", {})["targets_by_default"] = False
        try:
            return from_dict(document)
        except ConfigError as error:
            flat = {key: field for field, key in KEYS.items()}
            if error.key not in flat:
                raise
            name = flat[error.key]
            raise ConfigError(f"{name}: {str(error).removeprefix(error.key + ': ')}", name) from None


def _in_python(key: str) -> str:
    """Return the flat field of a key, or say where the key stands."""
    flat = {key: field for field, key in KEYS.items()}
    return flat.get(key, f"{key} in a YAML file")


_CLASS_FIELDS = ("scheduler", "kv_transfer_backend")


def _plain(field: str, value: Any) -> Any:
    """Turn a field's value into plain data: a class into its import path, a path and a torch dtype into text."""
    if isinstance(value, type) and field in _CLASS_FIELDS:
        return path_of_class(value, field)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if type(value).__module__ == "torch":
        return str(value).removeprefix("torch.")
    try:
        return msgspec.to_builtins(value)
    except (TypeError, ValueError, OverflowError, RecursionError):
        raise ConfigError(f"{field}: must be plain data, got {shown(value)}", field) from None


_IRREGULAR_KEYS = {
    "dtype": "model.dtype",
    "log_level": "logging.level",
    "scheduling_policy": "scheduler.policy",
    "ttft_target_ms": "scheduler.ttft_ms",
    "tpot_target_ms": "scheduler.tpot_ms",
}


def _keys() -> dict[str, str]:
    """Find the key of every flat field: a key's own name, or with its section in front (``kv_`` for kv_transfer)."""
    keys: dict[str, list[str]] = {field.name: [] for field in fields(PdDisaggConfig)}
    for section in msgspec.structs.fields(Config):
        if not (isinstance(section.type, type) and issubclass(section.type, Section)):
            keys[section.name].append(section.name)
            continue
        for name in section.type.__struct_fields__:
            prefix = "kv" if section.name == "kv_transfer" else section.name
            for flat in {name, f"{section.name}_{name}", f"{prefix}_{name}"} & keys.keys() - _IRREGULAR_KEYS.keys():
                keys[flat].append(f"{section.name}.{name}")
    regular = {}
    for flat, found in keys.items():
        if flat not in _IRREGULAR_KEYS:
            [regular[flat]] = found  # exactly one, or the rule needs an exception
    return {flat: (regular | _IRREGULAR_KEYS)[flat] for flat in keys}


KEYS = _keys()
"""Key of the `Config` by flat field, in the order of the fields."""
