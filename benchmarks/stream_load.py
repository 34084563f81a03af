"""A load of streams that decode all the time and prompts that keep arriving. It notes the time of every token."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from bisect import bisect_left, bisect_right
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hbserve.errors import HBServeError
from hbserve.sampling_params import SamplingParams
from hbserve.system.disaggregated_llm import DisaggregatedLLM

_START_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Gaps:
    """Gaps between two tokens of a request, ms."""

    sorted_ms: npt.NDArray[np.float64]

    def quantile(self, share: float) -> float:
        """Return the gap that a share of the gaps does not exceed; NaN without gaps."""
        number = len(self.sorted_ms)
        return float(self.sorted_ms[min(number - 1, int(share * number))]) if number else float("nan")

    @property
    def largest(self) -> float:
        """Largest gap; NaN without gaps."""
        return self.quantile(1.0)


@dataclass(frozen=True)
class StreamWindow:
    """Rate and gaps of the streams within a window of time.

    A request that runs at the end of the window adds the time since its last token as a gap.

    Attributes:
        tokens_per_s: rate of all streams together.
        running: gaps from the second token of a request to the third, and so on.
        starting: gaps from the first to the second token, where a request changes from prefill to decode.
    """

    tokens_per_s: float
    running: Gaps
    starting: Gaps


class StreamLoad:
    """The load of one system.

    Args:
        context: tokens of a stream's prompt.
        max_tokens: output tokens of a stream's request, or fewer if the model's context is full before.

    Attributes:
        token_times: by stream, and in it by request, on the monotonic clock.
        failures: reasons of failed requests.
    """

    def __init__(self, llm: DisaggregatedLLM, num_streams: int, context: int, max_tokens: int = 1024) -> None:
        self._llm, self._context = llm, context
        self._max_tokens = max(1, min(max_tokens, llm.engine.max_model_len - context))
        self._ended = asyncio.Event()
        self.token_times: dict[int, list[list[float]]] = {index: [] for index in range(num_streams)}
        self.failures: list[str] = []

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the streams while the body runs.

        Raises:
            TimeoutError: if a stream gets no tokens.
        """
        tasks = [asyncio.create_task(self._stream(index)) for index in self.token_times]
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                while not all(requests and len(requests[-1]) > 1 for requests in self.token_times.values()):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            yield
        finally:
            self._ended.set()
            await asyncio.gather(*tasks)

    @asynccontextmanager
    async def arrivals(self, prompt_tokens: int, interval_s: float, output_tokens: int) -> AsyncIterator[None]:
        """Send a prompt every ``interval_s`` while the body runs."""
        ended = asyncio.Event()
        task = asyncio.create_task(self._arrive(ended, prompt_tokens, interval_s, output_tokens))
        try:
            yield
        finally:
            ended.set()
            await task

    async def _arrive(self, ended: asyncio.Event, prompt_tokens: int, interval_s: float, output_tokens: int) -> None:
        running: set[asyncio.Task[Any]] = set()
        sampling = SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True)
        seed = 10**6
        while not ended.is_set():
            seed += 1
            prompt = random_prompt(prompt_tokens, seed, self._llm.engine.vocab_size)
            task = asyncio.create_task(self._noting(self._llm.generate(prompt, sampling)))
            running.add(task)
            task.add_done_callback(running.discard)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), interval_s)
        await asyncio.gather(*running)

    async def _stream(self, index: int) -> None:
        """Send one request after the other, so that the stream always decodes."""
        requests = self.token_times[index]
        turn = 0
        while not self._ended.is_set():
            # The first requests have different lengths, so that requests end at different times, as in a service.
            length = self._max_tokens if turn else self._max_tokens // 4 + 37 * index % self._max_tokens
            sampling = SamplingParams(temperature=0.8, seed=index, max_tokens=length, ignore_eos=True)
            requests.append([])
            prompt = random_prompt(self._context, 1000 * turn + index, self._llm.engine.vocab_size)
            await self._noting(self._receive(prompt, sampling, requests[-1]))
            turn += 1

    async def _receive(self, prompt: list[int], sampling: SamplingParams, times: list[float]) -> None:
        stream = self._llm.stream(prompt, sampling)
        async with contextlib.aclosing(stream):
            async for delta in stream:
                times.extend([time.monotonic()] * len(delta.token_ids))
                if self._ended.is_set():
                    return

    async def _noting(self, request: Any) -> None:
        try:
            await request
        except HBServeError as error:
            self.failures.append(str(error))
            await asyncio.sleep(0.1)  # a server that refuses at once must not be asked all the time

    def window(self, started: float, ended: float) -> StreamWindow:
        """Evaluate the time between two times. Fast, because it runs in the event loop whose gaps are measured."""
        running: list[npt.NDArray[np.float64]] = [np.empty(0)]
        starting: list[float] = []
        count = 0
        for requests in self.token_times.values():
            for times in requests:
                begin, end = bisect_left(times, started), bisect_right(times, ended)
                count += end - begin
                if begin <= 1 < end:
                    starting.append(times[1] - times[0])
                if end > max(begin, 2):
                    running.append(np.diff(times[max(begin - 1, 1) : end]))
                if end and (end < len(times) or times is requests[-1]):
                    # A stalled stream has no later token.
                    waiting = ended - max(times[end - 1], started)
                    if end > 1:
                        running.append(np.array([waiting]))
                    else:
                        starting.append(waiting)
        return StreamWindow(count / (ended - started), _gaps(np.concatenate(running)), _gaps(np.array(starting)))

    def long_gaps(self, started: float, ended: float, min_s: float) -> list[tuple[float, float, int]]:
        """Return the gaps of at least ``min_s`` that end between two times.

        Returns:
            For each moment: when the longest of its gaps began, its seconds, and how many streams had one.
        """
        found: list[tuple[float, float, int]] = []
        for requests in self.token_times.values():
            for times in requests:
                for before, after in itertools.pairwise(times[max(0, bisect_left(times, started) - 1) :]):
                    if after <= ended and after - before >= min_s:
                        found.append((before, after - before, 1))
        moments: list[tuple[float, float, int]] = []
        for began, seconds, _ in sorted(found):
            if moments and began < moments[-1][0] + moments[-1][1]:
                last = moments.pop()
                began, seconds = max(last[:2], (began, seconds), key=lambda gap: gap[1])
                moments.append((began, seconds, last[2] + 1))
            else:
                moments.append((began, seconds, 1))
        return moments

    async def until_all_have_tokens(self, since: float, timeout_s: float) -> float:
        """Wait until every stream has got a token after ``since``; return the seconds until the last one had it.

        Raises:
            TimeoutError: if a stream gets none within the time.
        """

        def first(requests: list[list[float]]) -> float | None:
            return next((times[bisect_right(times, since)] for times in requests if times and times[-1] > since), None)

        async with asyncio.timeout(timeout_s):
            while True:
                firsts = [first(requests) for requests in self.token_times.values()]
                if None not in firsts:
                    return max(at for at in firsts if at is not None) - since
                await asyncio.sleep(0.02)


def _gaps(seconds: npt.NDArray[np.float64]) -> Gaps:
    return Gaps(np.sort(1000 * seconds))


def random_prompt(length: int, seed: int, vocab_size: int) -> list[int]:
    """Draw token ids."""
    rng = random.Random(seed)
    return [rng.randrange(1, min(1000, vocab_size)) for _ in range(length)]
