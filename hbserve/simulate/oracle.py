"""An upper bound of what any schedule on a device can do, to compare systems with.

The bound is the optimum of a problem that is easier than serving: a clairvoyant schedule of prompts alone, on one
machine, with preemption. Each request is a job. It is released when the request arrives, and due one TTFT target later.
It takes the time that its prompt tokens add to the cheapest step of the profile. Decoding is free, every step is of the
best size, and KV is never evicted: a prompt block costs its first request only. So no system can keep the targets of
more requests than the largest set of jobs that can end in time.

Finding that set is 1 | pmtn, r_j | Σ U_j (Lawler, Annals of Operations Research 26, 1990). With one TTFT target the
deadlines come in the order of the releases. The earliest deadline first then never preempts, and the problem is that of
Kise, Ibaraki and Mine (Operations Research 26, 1978). A chosen set is in time if its jobs are, one after the other in
that order. For each number of chosen jobs it is enough to know the earliest end, so the optimum is exact, in O(n²).

N GPUs count as one GPU that is N times as fast. That GPU can do the work of all, in turns, and never later.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from hbserve.policy.step_time_predictor import StepTimePredictor, num_pairs
from hbserve.simulate.requests import SimulatedRequest


def largest_set(
    releases: Sequence[float], durations: Sequence[float], deadlines: Sequence[float]
) -> list[float | None]:
    """Find the largest set of jobs that one machine can end in time, with or without preemption.

    Args:
        releases: when each job may begin, ascending.
        durations: of each job, at least 0.
        deadlines: of each job, ascending too.

    Returns:
        When each job of the set ends; None for the others.
    """
    size = len(releases)
    ends = np.full(size + 1, math.inf)  # by number of jobs: the earliest end of so many of those seen
    ends[0] = -math.inf
    is_better = []
    for number, (release, duration, deadline) in enumerate(zip(releases, durations, deadlines, strict=True)):
        with_it = np.maximum(ends[: number + 1], release) + duration
        with_it[with_it > deadline] = math.inf
        is_better.append(np.packbits(with_it < ends[1 : number + 2]))
        np.minimum(with_it, ends[1 : number + 2], out=ends[1 : number + 2])
    left = int(np.flatnonzero(ends < math.inf)[-1])
    chosen = [False] * size
    for number in range(size - 1, -1, -1):
        if left and left <= number + 1 and is_better[number][(left - 1) // 8] >> (7 - (left - 1) % 8) & 1:
            chosen[number] = True
            left -= 1
    found: list[float | None] = []
    end = -math.inf
    for release, duration, is_chosen in zip(releases, durations, chosen, strict=True):
        end = max(end, release) + duration if is_chosen else end
        found.append(end if is_chosen else None)
    return found


def serve_best(
    requests: Sequence[SimulatedRequest], steps: StepTimePredictor, ttft_target_ms: float, num_gpus: int
) -> list[float | None]:
    """Find when the bound's schedule ends each prompt; None for a request that it leaves out.

    Args:
        requests: by arrival.
        steps: of the device; they need a profile.
    """
    assert steps.curves is not None, "only a profile says what a prompt costs"
    target_s = ttft_target_ms / 1000
    seen: set[int] = set()
    jobs = []
    for index, request in enumerate(requests):
        cached = _num_seen(request, seen)
        tokens = max(1, request.prompt_tokens - cached)
        seconds = steps.curves.added_prompt_s(tokens, num_pairs(tokens, request.prompt_tokens - tokens))
        seen.update(request.prefix_blocks)
        if seconds <= target_s:  # else no GPU can do it in time, and no two share a prompt
            jobs.append((index, request.arrival, seconds / num_gpus))
    found = largest_set([job[1] for job in jobs], [job[2] for job in jobs], [job[1] + target_s for job in jobs])
    ends: list[float | None] = [None] * len(requests)
    for (index, _, _), end in zip(jobs, found, strict=True):
        ends[index] = end
    return ends


def _num_seen(request: SimulatedRequest, seen: set[int]) -> int:
    """Count the leading tokens of a prompt that earlier ones began with, whether these have been computed or not."""
    blocks = 0
    for name in request.prefix_blocks:
        if name not in seen:
            break
        blocks += 1
    return min(request.prompt_tokens, blocks * request.block_tokens)
