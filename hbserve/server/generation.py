"""What both generation endpoints do: run prompts, count tokens, gather samples."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from hbserve.pd_disagg.generation_output import Sample, SampleDelta
from hbserve.pd_disagg.text_engine import Prompt, TextEngine, merge_streams
from hbserve.sampling_params import SamplingParams


class Generation:
    """One HTTP request's prompts, running concurrently.

    Args:
        request_id: the id in the response; prompt p runs as ``<request_id>-<p>``.

    Attributes:
        num_choices: samples of all prompts; choice ``p * n + i`` is sample i of prompt p.
    """

    def __init__(
        self, engine: TextEngine, request_id: str, prompts: Sequence[Prompt], sampling: SamplingParams
    ) -> None:
        self.num_choices = len(prompts) * sampling.n
        self._engine = engine
        self._request_id = request_id
        self._prompts = prompts
        self._sampling = sampling
        self._prompt_tokens = [0] * len(prompts)
        self._cached_tokens = [0] * len(prompts)
        self._completion_tokens = 0

    async def stream(self) -> AsyncGenerator[tuple[int, SampleDelta]]:
        """Choice numbers and what those choices have grown by. Errors as in `TextEngine.stream`."""
        streams = [self._run(number, prompt) for number, prompt in enumerate(self._prompts)]
        async with aclosing(merge_streams(streams)) as merged:
            async for item in merged:
                yield item

    async def collect(self) -> list[Sample]:
        """All choices, finished."""
        samples = [Sample(index=index) for index in range(self.num_choices)]
        async with aclosing(self.stream()) as deltas:
            async for choice, delta in deltas:
                samples[choice].add(delta)
        return samples

    def usage(self) -> dict[str, Any]:
        """OpenAI's ``usage`` object for what has been streamed; a prompt counts once, whatever n is."""
        prompt_tokens = sum(self._prompt_tokens)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": prompt_tokens + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached_tokens)},
        }

    async def _run(self, number: int, prompt: Prompt) -> AsyncGenerator[tuple[int, SampleDelta]]:
        request_id = f"{self._request_id}-{number}"
        async with aclosing(self._engine.stream(prompt, self._sampling, request_id)) as deltas:
            async for delta in deltas:
                self._prompt_tokens[number] = delta.num_prompt_tokens
                self._completion_tokens += len(delta.token_ids)
                if delta.index == 0:  # the other samples may find the first one's prompt in the cache
                    self._cached_tokens[number] += delta.num_cached_tokens
                yield number * self._sampling.n + delta.index, delta
