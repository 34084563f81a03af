"""Introductions of workers that a test plays."""

from __future__ import annotations

from typing import Any

import msgspec

from hbserve.config import InstanceRole
from hbserve.messages.worker import Hello

_HELLO = Hello(
    instance_id="unified-0",
    role=InstanceRole.UNIFIED,
    serves_as=InstanceRole.UNIFIED,
    epoch=1,
    arena_epoch=1,
    pid=1,
    model="m",
    dtype="float32",
    kv_dtype="float32",
    num_blocks=200,
    block_size=16,
    block_bytes=16,
    num_layers=1,
    head_bytes=16,
    max_model_len=1000,
    vocab_size=1024,
    device="cpu",
    peers=[],
)


def hello(role: InstanceRole = InstanceRole.UNIFIED, **fields: Any) -> Hello:
    """Return the introduction of a worker with a memory of its own; ``fields`` replace those of a small worker."""
    return msgspec.structs.replace(_HELLO, role=role, serves_as=role, **fields)
