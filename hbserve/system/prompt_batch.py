"""Batches of prompts for the Python API."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

from hbserve.frontend.outputs import GenerationOutput
from hbserve.frontend.text_engine import Prompt, TextEngine
from hbserve.sampling_params import SamplingParams

Samplings = SamplingParams | Sequence[SamplingParams] | None
"""Sampling parameters of a batch: for all prompts, or one per prompt."""


async def generate_all(
    engine: TextEngine,
    prompts: Sequence[Prompt],
    sampling_params: Samplings,
    max_waiting: int,
    on_done: Callable[[], object] = lambda: None,
) -> list[GenerationOutput]:
    """Generate for all prompts; returns one output per prompt, in order.

    Args:
        max_waiting: samples that may wait at the scheduler; further prompts wait here.
        on_done: called after each prompt.

    Raises:
        TypeError, ValueError: if ``sampling_params`` have another type or number.
        HBServeError: if one prompt fails; the others are then aborted.
    """
    samplings = _per_prompt(sampling_params, engine.default_sampling, len(prompts))
    max_samples = max((sampling.n for sampling in samplings), default=1)
    slots = asyncio.Semaphore(max(1, max_waiting // max_samples))

    async def generate(prompt: Prompt, sampling: SamplingParams) -> GenerationOutput:
        async with slots:
            output = await engine.generate(prompt, sampling)
        on_done()
        return output

    tasks = [asyncio.create_task(generate(*pair)) for pair in zip(prompts, samplings, strict=True)]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def as_batch(prompts: Prompt | Iterable[Prompt]) -> list[Prompt]:
    """Return prompts as a list; a string or a list of token ids is one prompt.

    Raises:
        TypeError: if ``prompts`` is neither a prompt nor an iterable of prompts.
    """
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Iterable) or isinstance(prompts, bytes | bytearray | Mapping | Set):
        kind = type(prompts).__name__
        raise TypeError(f"a prompt is a string or a list of token ids, and several are a list of them; got {kind}")
    batch: list[Any] = list(prompts)
    return [batch] if batch and all(isinstance(item, int) for item in batch) else batch


def _per_prompt(sampling_params: Samplings, default: SamplingParams, num_prompts: int) -> list[SamplingParams]:
    if sampling_params is None or isinstance(sampling_params, SamplingParams):
        return [sampling_params or default] * num_prompts
    if not all(isinstance(sampling, SamplingParams) for sampling in sampling_params):
        raise TypeError(f"sampling_params must be SamplingParams, or one of them per prompt, got {sampling_params!r}")
    if len(sampling_params) != num_prompts:
        raise ValueError(
            f"{len(sampling_params)} sampling params for {num_prompts} prompts; give one or one per prompt"
        )
    return list(sampling_params)
