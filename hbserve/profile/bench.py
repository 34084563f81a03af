"""What a profile measures, in which order."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hbserve.config import Config
from hbserve.profile.processes import ProfiledDevice, StepperProcess
from hbserve.profile.stepper import Measured, Work
from hbserve.slo.step_profile import DecodePoint, MixedPoint, PrefillPoint, StepProfile, TogetherPoint


@dataclass(frozen=True, kw_only=True)
class ProfilePlan:
    """The points to measure.

    Attributes:
        percentages: of either phase alone.
        splits: (prefill, decode) side by side.
        prompts: tokens per prefill step. prompt_context: tokens before them, one more point for the largest.
        batches, contexts: of decode.
        chunks: of the unified worker.
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
"""One to two minutes for an 8B model on one GPU."""

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
"""A first look."""

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
"""Seconds, for a small model on a few cores."""


def run_profile(config: Config, plan: ProfilePlan, say: Callable[[str], None]) -> StepProfile:
    """Start the processes, measure every point, end them.

    Args:
        say: called with a line per point.

    Raises:
        StartupError: if a process cannot start, or does not answer.
    """
    prefill = sorted({*plan.percentages, *(p for p, _ in plan.splits)}, reverse=True)
    decode = sorted({*plan.percentages, *(d for _, d in plan.splits)}, reverse=True)
    with ProfiledDevice(config, prefill, decode) as device:
        bench = _Bench(device, plan, say)
        prefill_points = tuple(bench.prefill())
        decode_points = tuple(bench.decode())
        together_points = tuple(bench.together())
        mixed_points = tuple(bench.mixed())
        return StepProfile(
            model=Path(config.model.path).name,
            device=device.device,
            source="python -m hbserve.profile",
            prefill=prefill_points,
            decode=decode_points,
            together=together_points,
            mixed=mixed_points,
        )


class _Bench:
    """Points, one after the other. Prefill and decode use a half of the KV blocks each."""

    def __init__(self, device: ProfiledDevice, plan: ProfilePlan, say: Callable[[str], None]) -> None:
        self._device, self._plan, self._say = device, plan, say
        self._half = device.num_blocks // 2

    def _fits(self, sequences: int, tokens: int) -> bool:
        blocks = sequences * -(-tokens // self._device.block_size)
        return blocks <= self._half and sequences < self._device.config.performance.max_num_seqs

    def _prefill_work(self, tokens: int, context: int = 0) -> Work:
        seconds = self._plan.seconds
        return Work(
            tokens=tokens,
            prompt_context=context,
            seconds=seconds,
            lead_s=seconds / 3,
            first_block=0,
            num_blocks=self._half,
        )

    def _decode_work(self, batch: int, context: int) -> Work:
        seconds = self._plan.seconds
        return Work(
            batch=batch,
            context=context,
            seconds=seconds,
            lead_s=seconds / 3,
            first_block=self._half,
            num_blocks=self._half,
        )

    def _alone(self, process: StepperProcess, work: Work, what: str) -> Measured:
        process.begin(work)
        measured = process.finish(work)
        self._say(f"{what}: {measured.ms:.2f} ms")
        return measured

    def prefill(self) -> Iterator[PrefillPoint]:
        """Prefill alone."""
        plan = self._plan
        sizes = [(tokens, 0) for tokens in plan.prompts] + [(max(plan.prompts), plan.prompt_context)]
        sizes = [size for size in sizes if self._fits(1, sum(size)) and sum(size) <= self._longest]
        for percentage in plan.percentages:
            for tokens, context in sizes:
                what = f"prefill alone at {percentage} %, {tokens} tokens after {context}"
                measured = self._alone(self._device.prefill(percentage), self._prefill_work(tokens, context), what)
                yield PrefillPoint(percentage=percentage, tokens=tokens, context=context, ms=measured.ms)

    def decode(self) -> Iterator[DecodePoint]:
        """Decode alone."""
        for percentage in self._plan.percentages:
            for batch, context in self._decode_sizes():
                what = f"decode alone at {percentage} %, {batch} sequences of {context} tokens"
                measured = self._alone(self._device.decode(percentage), self._decode_work(batch, context), what)
                yield DecodePoint(percentage=percentage, batch=batch, context=context, ms=measured.ms)

    def together(self) -> Iterator[TogetherPoint]:
        """Both, each without a pause, for the same time."""
        longest = max(t for t in self._plan.prompts if t <= 2048 and self._fits(1, t) and t <= self._longest)
        # Short prompts are slowed down otherwise than long ones: their kernels fill less of the device.
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
                self._say(
                    f"side by side at ({prefill_percentage}, {decode_percentage}) %, {tokens} tokens and {batch} "
                    f"sequences of {context}: prefill {prefill_ms:.2f} ms, decode {decode_ms:.2f} ms"
                )
                yield TogetherPoint(
                    prefill_percentage=prefill_percentage,
                    decode_percentage=decode_percentage,
                    priority=bool(self._device.config.semi_pd.prefill_priority),
                    tokens=tokens,
                    batch=batch,
                    context=context,
                    prefill_ms=prefill_ms,
                    decode_ms=decode_ms,
                )

    def mixed(self) -> Iterator[MixedPoint]:
        """Chunks in decode batches, in one process."""
        context = max(c for c in self._plan.contexts if self._fits(1, c))
        for batch in sorted({batch for batch, c in self._decode_sizes() if c == context})[-2:]:
            for chunk in self._plan.chunks:
                decode = self._decode_work(batch, context)
                work = Work(
                    tokens=chunk,
                    batch=batch,
                    context=context,
                    seconds=decode.seconds,
                    lead_s=decode.lead_s,
                    first_block=0,
                    num_blocks=2 * self._half,
                )
                what = f"one worker, {chunk} tokens among {batch} sequences of {context}"
                measured = self._alone(self._device.mixed, work, what)
                yield MixedPoint(chunk=chunk, batch=batch, context=context, ms=measured.ms)

    def _decode_sizes(self) -> list[tuple[int, int]]:
        sizes = [(batch, context) for batch in self._plan.batches for context in self._plan.contexts]
        return [size for size in sizes if self._fits(*size)]

    @property
    def _longest(self) -> int:
        limit = self._device.config.model.max_model_len
        return self._half * self._device.block_size if limit is None else limit - 1
