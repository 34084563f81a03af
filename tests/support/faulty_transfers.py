"""Transfer backends that go wrong, for systems that tests start.

They stand apart from the tests, so that the workers that load them need not import what only the tests need.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from hbserve.engine.model_runner import ModelRunner, PendingStep
from hbserve.errors import KVTransferError, StartupError
from hbserve.kv_transfer.base import KVTransferContext
from hbserve.messages.worker import StepPlan
from tests.support.stream_transfer import StreamKVTransfer

_BLOCK_BYTES = 4 * 2 * 16 * 2 * 64 * 4
"""Layers, k and v, tokens, KV heads, head size, float32: of the demo model."""


class FailsOnceOnRank1(StreamKVTransfer):
    """The first receive of rank 1 fails, while that of rank 0 is fine."""

    count = 0

    async def receive_kv_cache(self, request_id: str, source_rank: int) -> torch.Tensor:
        type(self).count += 1
        if self.context.rank % 2 == 1 and self.count == 1:
            raise KVTransferError("the cable was pulled")
        return await super().receive_kv_cache(request_id, source_rank)


class BreaksOneStepOfRank1(StreamKVTransfer):
    """Has rank 1's next step fail, once: the file named in the environment tells that it has happened."""

    def __init__(self, context: KVTransferContext) -> None:
        super().__init__(context)
        marker = Path(os.environ["TEST_MARKER"])
        if context.rank % 2 == 0 or marker.exists():
            return
        marker.touch()

        def launch(runner: ModelRunner, plan: StepPlan, on_stored: object = None) -> PendingStep:
            raise RuntimeError("a wire is loose")

        ModelRunner.launch = launch  # type: ignore[assignment, method-assign]


class CannotStartOnRank1(StreamKVTransfer):
    async def start(self) -> None:
        if self.context.rank % 2 == 1:
            raise StartupError("no wire is left")
        await super().start()


class WipesThirdBlock(StreamKVTransfer):
    """Loses one block of each prompt: the third one of the first chunk."""

    async def receive_kv_cache(self, request_id: str, source_rank: int) -> torch.Tensor:
        buffer = await super().receive_kv_cache(request_id, source_rank)
        if buffer.shape[0] == 4 * _BLOCK_BYTES:  # a whole chunk of 64 tokens
            buffer[2 * _BLOCK_BYTES : 3 * _BLOCK_BYTES] = 0
        return buffer


class CorruptingKVTransfer(StreamKVTransfer):
    """Delivers every second transfer with one byte in a thousand wrong."""

    count = 0

    async def receive_kv_cache(self, request_id: str, source_rank: int) -> torch.Tensor:
        buffer = await super().receive_kv_cache(request_id, source_rank)
        type(self).count += 1
        if self.count % 2:
            buffer.view(-1)[::1001] ^= 0x7F  # 1001 is odd: it meets every byte of a float in turn
        return buffer


class FailingKVTransfer(StreamKVTransfer):
    """Fails on the first link, delivers something else on the second, then works; but never for a single block."""

    async def send_kv_cache(self, request_id: str, kv_buffer: torch.Tensor, target_rank: int) -> None:
        if len(kv_buffer) == 1:
            raise ConnectionError("the line is dead")
        await super().send_kv_cache(request_id, kv_buffer, target_rank)

    async def receive_kv_cache(self, request_id: str, source_rank: int) -> torch.Tensor:
        link = self.peers[source_rank].link_epoch
        if link == 1:
            raise ConnectionError("the cable was pulled")
        buffer = await super().receive_kv_cache(request_id, source_rank)
        if link == 2:
            buffer[len(buffer) // 2] ^= 1
        return buffer
