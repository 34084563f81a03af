"""The points of a profile: which there are, and how each is measured."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hbserve.config import Config
from hbserve.policy.step_profile import FORMAT, PairPoint, StepPoint, StepProfile
from hbserve.profile.processes import ProfiledDevice, StepperProcess
from hbserve.profile.stepper import Work


@dataclass(frozen=True, kw_only=True)
class ProfilePlan:
    """The points to measure.

    Attributes:
        percentages: of either phase alone.
        splits: (prefill, decode) percentages side by side.
        prompts: tokens per prefill step.
        prompt_context: tokens before the largest of ``prompts``, in one more point.
        batches, contexts: of decode.
        chunks: prompt tokens in a step of the unified worker.
        seconds: per point, after a lead of a third of it.
    """

    percentages: tuple[int, ...]
    splits: tuple[tuple[int, int], ...]
    prompts: tuple[int, ...]
    prompt_context: int
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    chunks: tuple[int, ...]
    seconds: float


GPU_PLAN = ProfilePlan(
    percentages=(100, 80, 60, 40, 20),
    splits=((100, 100), (100, 60), (100, 40), (80, 100), (80, 60), (80, 40), (60, 100), (60, 60), (60, 40), (40, 100)),
    prompts=(128, 512, 2048, 4096),
    prompt_context=8192,
    batches=(1, 16, 64, 192),
    contexts=(256, 1024),
    chunks=(128, 512, 2048),
    seconds=0.3,
)
"""A plan of one to two minutes for an 8B model on one GPU."""

SHORT_GPU_PLAN = ProfilePlan(
    percentages=(100, 50),
    splits=((100, 100), (100, 50), (80, 50), (50, 50)),
    prompts=(512, 2048),
    prompt_context=8192,
    batches=(64, 192),
    contexts=(1024,),
    chunks=(512,),
    seconds=0.2,
)
"""A plan for a first look."""

CPU_PLAN = ProfilePlan(
    percentages=(100, 50),
    splits=((50, 50), (100, 100)),
    prompts=(32, 128),
    prompt_context=128,
    batches=(1, 8),
    contexts=(64, 128),
    chunks=(32,),
    seconds=0.1,
)
"""A plan of seconds, for a small model on a few cores."""


def run_profile(config: Config, plan: ProfilePlan, show: Callable[[str], None]) -> StepProfile:
    """Start the processes, measure every point, end them.

    Args:
        show: called with a line per point.

    Raises:
        StartupError: if a process cannot start, or does not answer.
    """
    prefill = sorted({*plan.percentages, *(p for p, _ in plan.splits)}, reverse=True)
    decode = sorted({*plan.percentages, *(d for _, d in plan.splits)}, reverse=True)
    with ProfiledDevice(config, prefill, decode) as device:
        points = _Points(device, plan, show)
        return StepProfile(
            format=FORMAT,
            model=Path(config.model.path).name,
            device=device.device,
            source="python -m hbserve.profile",
            steps=(*points.prefill(), *points.decode(), *points.mixed()),
            pairs=tuple(points.pairs()),
        )


class _Points:
    """Measurement of points, one after the other. Prefill and decode use a half of the KV blocks each."""

    def __init__(self, device: ProfiledDevice, plan: ProfilePlan, show: Callable[[str], None]) -> None:
        self._device, self._plan, self._show = device, plan, show
        self._half = device.num_blocks // 2

    def _fits(self, sequences: int, tokens: int) -> bool:
        blocks = sequences * -(-tokens // self._device.block_size)
        return blocks <= self._half and sequences < self._device.config.performance.max_num_seqs

    def _prefill_work(self, tokens: int, context: int = 0) -> Work:
        seconds, half = self._plan.seconds, self._half
        return Work(tokens=tokens, prompt_context=context, seconds=seconds, first_block=0, num_blocks=half)

    def _decode_work(self, batch: int, context: int) -> Work:
        seconds, half = self._plan.seconds, self._half
        return Work(batch=batch, context=context, seconds=seconds, first_block=half, num_blocks=half)

    def _alone_ms(self, process: StepperProcess, work: Work, name: str) -> float:
        process.begin(work)
        ms = process.finish(work).ms
        self._show(f"{name}: {ms:.2f} ms")
        return ms

    def prefill(self) -> Iterator[StepPoint]:
        """Measure prefill alone."""
        plan = self._plan
        sizes = [(tokens, 0) for tokens in plan.prompts] + [(max(plan.prompts), plan.prompt_context)]
        sizes = [size for size in sizes if self._fits(1, sum(size)) and sum(size) <= self._longest]
        for percentage, (tokens, context) in itertools.product(plan.percentages, sizes):
            name = f"prefill alone at {percentage} %, {tokens} tokens after {context}"
            ms = self._alone_ms(self._device.prefill(percentage), self._prefill_work(tokens, context), name)
            yield StepPoint(percentage=percentage, prompt_tokens=tokens, prompt_context=context, ms=ms)

    def decode(self) -> Iterator[StepPoint]:
        """Measure decode alone."""
        for percentage, (batch, context) in itertools.product(self._plan.percentages, self._decode_sizes()):
            name = f"decode alone at {percentage} %, {batch} sequences of {context} tokens"
            ms = self._alone_ms(self._device.decode(percentage), self._decode_work(batch, context), name)
            yield StepPoint(percentage=percentage, decode_rows=batch, decode_context=context, ms=ms)

    def pairs(self) -> Iterator[PairPoint]:
        """Measure both phases side by side, each without a pause, for the same time."""
        longest = max(t for t in self._plan.prompts if t <= 2048 and self._fits(1, t) and t <= self._longest)
        # Side by side, short prompts slow down by another factor than long ones: their kernels fill less of the device.
        sizes = (longest, max((t for t in self._plan.prompts if t <= longest // 4), default=longest))
        context = max(c for c in self._plan.contexts if self._fits(1, c))
        batches = sorted({batch for batch, c in self._decode_sizes() if c == context and batch > 1})[-3:]
        for prefill_percentage, decode_percentage in self._plan.splits:
            for tokens, batch in itertools.product(sorted(set(sizes), reverse=True), batches):
                prefill, decode = self._prefill_work(tokens), self._decode_work(batch, context)
                prefill_process = self._device.prefill(prefill_percentage)
                decode_process = self._device.decode(decode_percentage)
                prefill_process.begin(prefill)
                decode_process.begin(decode)
                prefill_ms = prefill_process.finish(prefill).ms
                decode_ms = decode_process.finish(decode).ms
                self._show(
                    f"side by side at ({prefill_percentage}, {decode_percentage}) %, {tokens} tokens and {batch} "
                    f"sequences of {context}: prefill {prefill_ms:.2f} ms, decode {decode_ms:.2f} ms"
                )
                yield PairPoint(
                    prefill_percentage=prefill_percentage,
                    decode_percentage=decode_percentage,
                    priority=bool(self._device.config.semi_pd.prefill_priority),
                    prompt_tokens=tokens,
                    decode_rows=batch,
                    decode_context=context,
                    prefill_ms=prefill_ms,
                    decode_ms=decode_ms,
                )

    def mixed(self) -> Iterator[StepPoint]:
        """Measure prompt chunks in decode batches, in one process."""
        seconds, num_blocks = self._plan.seconds, 2 * self._half
        context = max(c for c in self._plan.contexts if self._fits(1, c))
        batches = sorted({batch for batch, c in self._decode_sizes() if c == context})[-2:]
        for batch, chunk in itertools.product(batches, self._plan.chunks):
            work = Work(
                tokens=chunk, batch=batch, context=context, seconds=seconds, first_block=0, num_blocks=num_blocks
            )
            name = f"one worker, {chunk} tokens among {batch} sequences of {context}"
            ms = self._alone_ms(self._device.mixed, work, name)
            yield StepPoint(percentage=100, prompt_tokens=chunk, decode_rows=batch, decode_context=context, ms=ms)

    def _decode_sizes(self) -> list[tuple[int, int]]:
        sizes = itertools.product(self._plan.batches, self._plan.contexts)
        return [size for size in sizes if self._fits(*size)]

    @property
    def _longest(self) -> int:
        limit = self._device.config.model.max_model_len
        return self._half * self._device.block_size if limit is None else limit - 1
