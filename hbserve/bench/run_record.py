"""One run of a request batch on a running engine, and what each instance did in it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from hbserve import LLM, SamplingParams
from hbserve.bench.request_batch import RequestBatch
from hbserve.errors import RequestFailedError

Drafts = Mapping[str, Mapping[str, int]]
"""By drafter, its verified drafts, their tokens, and the right ones, as ``/stats`` counts them."""

_JUST_JOINED = {"busy_s": 0.0, "host_s": 0.0, "steps": 0}


@dataclass(frozen=True)
class InstanceWork:
    """Work of one instance in a run.

    Attributes:
        busy_s: time in which its device worked.
        busy_share: that time as a share of the run's.
        host_ms_per_step: time in which its host prepared and launched a step; on a CPU the step itself.
    """

    role: str
    device: str
    steps: int
    busy_s: float
    busy_share: float
    host_ms_per_step: float


@dataclass(frozen=True)
class RunRecord:
    """Numbers of one run.

    Attributes:
        seconds: from the call to the last token of the last request.
        cached_prompt_tokens: prompt tokens whose KV was in the prefix cache; the floor assumes 0.
        preemptions: how often KV blocks ran out and a decoding request had to be computed again.
        kv_transfer_bytes: bytes moved between instances.
        drafts: of speculation.
    """

    seconds: float
    num_prompt_tokens: int
    num_output_tokens: int
    cached_prompt_tokens: int
    preemptions: int
    kv_transfer_bytes: int
    drafts: Drafts
    instances: dict[str, InstanceWork]


def run_batch(llm: LLM, batch: RequestBatch, sampling: SamplingParams) -> RunRecord:
    """Send all requests at once and wait for all.

    Args:
        sampling: with a seed; request i gets its own length and seed + i.

    Raises:
        RequestFailedError: if a request did not produce exactly the tokens asked for.
    """
    assert sampling.seed is not None
    samplings = [
        msgspec.structs.replace(sampling, max_tokens=length, seed=sampling.seed + index)
        for index, length in enumerate(batch.output_lens)
    ]
    before = llm.get_system_stats()
    start = time.perf_counter()
    outputs = llm.generate(list(batch.prompts), samplings, use_tqdm=False)
    seconds = time.perf_counter() - start
    after = llm.get_system_stats()
    for index, (output, length) in enumerate(zip(outputs, batch.output_lens, strict=True)):
        if len(output["token_ids"]) != length:
            raise RequestFailedError(f"request {index} has {len(output['token_ids'])} tokens, asked for were {length}")
    return RunRecord(
        seconds=seconds,
        num_prompt_tokens=sum(output["num_prompt_tokens"] for output in outputs),
        num_output_tokens=sum(len(output["token_ids"]) for output in outputs),
        cached_prompt_tokens=sum(output["num_cached_tokens"] for output in outputs),
        preemptions=after["cpu_scheduler"]["preemptions"] - before["cpu_scheduler"]["preemptions"],
        kv_transfer_bytes=_transferred_bytes(after) - _transferred_bytes(before),
        drafts=drafts_between(*(stats["cpu_scheduler"]["speculation"] for stats in (before, after))),
        instances={
            name: _instance_work(before["gpu_instances"].get(name, _JUST_JOINED), instance, seconds)
            for name, instance in after["gpu_instances"].items()
        },
    )


def drafts_between(before: Drafts, after: Drafts) -> Drafts:
    """Return what the drafters did meanwhile; those that did nothing are left out."""
    changes = {
        name: {key: count - before.get(name, {}).get(key, 0) for key, count in counts.items()}
        for name, counts in after.items()
    }
    return {name: counts for name, counts in changes.items() if counts["drafted_tokens"]}


def _instance_work(before: dict[str, Any], after: dict[str, Any], seconds: float) -> InstanceWork:
    busy_s = after["busy_s"] - before["busy_s"]
    steps = after["steps"] - before["steps"]
    host_ms_per_step = 1000 * (after["host_s"] - before["host_s"]) / max(1, steps)
    return InstanceWork(after["role"], after.get("device", "lost"), steps, busy_s, busy_s / seconds, host_ms_per_step)


def _transferred_bytes(stats: dict[str, Any]) -> int:
    return sum(link["bytes"] for link in stats["kv_transfer"]["links"].values())
