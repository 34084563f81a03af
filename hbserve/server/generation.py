"""What both generation endpoints do: run prompts, count tokens, gather samples."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from hbserve.errors import RequestTimeoutError
from hbserve.frontend.outputs import Sample, SampleDelta, TextStream
from hbserve.frontend.text_engine import Prompt, TextEngine
from hbserve.sampling_params import SamplingParams


class Deadline:
    """When a request is given up.

    Args:
        timeout_s: from now on; None: never.
    """

    def __init__(self, timeout_s: float | None) -> None:
        self._timeout_s = timeout_s
        self.at = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s

    @property
    def error(self) -> RequestTimeoutError:
        """What its client is told."""
        return RequestTimeoutError(f"not finished within {self._timeout_s:g} s (server.request_timeout_s)")

    @asynccontextmanager
    async def applied(self) -> AsyncGenerator[None]:
        """Cancel what is done within when it is time.

        Raises:
            RequestTimeoutError
        """
        try:
            async with asyncio.timeout_at(self.at):
                yield
        except TimeoutError:
            raise self.error from None


class Generation:
    """One HTTP request's prompts, running concurrently.

    Args:
        request_id: the id in the response, and the engine's name for it.
        deadline: then it ends with an error.

    Attributes:
        num_choices: samples of all prompts; choice ``p * n + i`` is sample i of prompt p.
    """

    def __init__(
        self,
        engine: TextEngine,
        request_id: str,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        deadline: Deadline,
    ) -> None:
        self.num_choices = len(prompts) * sampling.n
        self._engine = engine
        self._request_id = request_id
        self._prompts = prompts
        self._sampling = sampling
        self._stream: TextStream | None = None
        self._deadline = deadline
        self._timer: asyncio.TimerHandle | None = None
        self._cached_tokens = [0] * len(prompts)
        self._completion_tokens = 0

    async def read(self) -> list[SampleDelta]:
        """What is new since the last call; empty at the end. Starts with the first call; errors as in `TextEngine`."""
        if self._stream is None:
            deadline = self._deadline
            async with deadline.applied():
                self._stream = await self._engine.open(self._prompts, self._sampling, self._request_id)
            if deadline.at is not None:
                self._timer = asyncio.get_running_loop().call_at(deadline.at, self._stream.fail, deadline.error)
        deltas = await self._stream.read()
        for delta in deltas:
            self._completion_tokens += len(delta.token_ids)
            prompt, sample = divmod(delta.index, self._sampling.n)
            if sample == 0:  # the other samples may find the first one's prompt in the cache
                self._cached_tokens[prompt] += delta.num_cached_tokens
        return deltas

    async def collect(self) -> list[Sample]:
        """All choices, finished."""
        samples = [Sample(index=index) for index in range(self.num_choices)]
        try:
            while deltas := await self.read():
                for delta in deltas:
                    samples[delta.index].add(delta)
        finally:
            self.close()
        return samples

    def close(self) -> None:
        """Abort what is still open."""
        if self._timer is not None:
            self._timer.cancel()
        if self._stream is not None:
            self._stream.close()

    @property
    def prompt_token_ids(self) -> list[list[int]]:
        """Of every prompt, once something has been read."""
        return [] if self._stream is None else self._stream.prompt_token_ids

    def usage(self) -> dict[str, Any]:
        """OpenAI's ``usage`` object for what has been read; a prompt counts once, whatever n is."""
        prompt_tokens = sum(map(len, self.prompt_token_ids))
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": prompt_tokens + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached_tokens)},
        }
