"""An engine of our own, in this process, as the target of a load: no HTTP in between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import msgspec

from hbserve import Config, DisaggregatedLLM, SamplingParams
from hbserve.bench.http_target import split_in
from hbserve.bench.target import TargetError
from hbserve.errors import HBServeError
from hbserve.semi_pd.process_rotation_manager import ProcessRotationManager
from hbserve.semi_pd.sm_allocation import SMAllocation

_SPLIT_TIMEOUT_S = 30.0


class EngineTarget:
    """Streams from a running system. Made by `start`.

    Args:
        sampling: of every request, but for its length.
    """

    def __init__(self, llm: DisaggregatedLLM, sampling: SamplingParams) -> None:
        self.vocab_size = llm.engine.vocab_size
        self.max_model_len: int | None = llm.engine.max_model_len
        self._llm = llm
        self._sampling = sampling

    async def generate(self, prompt: list[int], output_len: int, targets: dict[str, float]) -> AsyncGenerator[int]:
        """See `ServeTarget.generate`."""
        sampling = msgspec.structs.replace(self._sampling, max_tokens=output_len, **targets)
        try:
            async with aclosing(self._llm.stream(prompt, sampling)) as deltas:
                async for delta in deltas:
                    if delta.token_ids:
                        yield len(delta.token_ids)
        except HBServeError as error:
            raise TargetError(type(error).__name__) from error

    async def split(self) -> tuple[float, float, bool] | None:
        """Of its first semi-PD instance, where it has one."""
        managers = self._llm.supervisors.items()
        status = {name: each.get_status() for name, each in managers if isinstance(each, ProcessRotationManager)}
        return split_in({"instances": status})

    async def set_split(self, allocation: SMAllocation) -> None:
        """Of all its semi-PD instances; returns when it is in effect."""
        managers = [each for each in self._llm.supervisors.values() if isinstance(each, ProcessRotationManager)]
        for manager in managers:
            if manager.current_sm_allocation != allocation and manager.request_sm_reallocation(allocation):
                await asyncio.to_thread(manager.wait_until_settled, _SPLIT_TIMEOUT_S)

    async def describe(self) -> dict[str, Any]:
        """The engine's whole configuration and its statistics."""
        config: dict[str, Any] = msgspec.to_builtins(self._llm.config)
        return {"config": config, "stats": await self._llm.client.stats()}


@asynccontextmanager
async def start(config: Config, sampling: SamplingParams) -> AsyncIterator[EngineTarget]:
    """Start a system, and end it.

    Raises:
        HBServeError: whatever keeps it from starting.
    """
    async with DisaggregatedLLM(config) as llm:
        yield EngineTarget(llm, sampling)
