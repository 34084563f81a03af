"""Running seeds: one, many on all cores, and the search for a smaller scenario that fails in the same way."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any

from tests.fault_search.scenario import Scenario, draw
from tests.fault_search.world import World

_SEEDS_PER_JOB = 100


@dataclass(frozen=True)
class Failure:
    """What went wrong in a run: its text, and the place that raised it, which tells kinds of failures apart."""

    seed: int
    text: str
    place: str

    def __str__(self) -> str:
        return f"{self.text}\n    at {self.place}\n    replay: python -m tests.fault_search --seed {self.seed}"


def run(scenario: Scenario, tell: Callable[[str], None] | None = None) -> Failure | None:
    """Run one scenario; None: all was right."""
    try:
        World(scenario, tell).run()
    except Exception as error:  # an assertion of the core, or anything else that a bug raises
        last = traceback.extract_tb(error.__traceback__)[-1]
        return Failure(scenario.seed, f"{type(error).__name__}: {error}", f"{last.filename}:{last.lineno}")
    return None


def run_seeds(first: int, end: int) -> list[Failure]:
    """Run the seeds ``first .. end - 1``; returns the failures."""
    return [failure for seed in range(first, end) if (failure := run(draw(seed))) is not None]


def search(first: int, seconds: float, processes: int) -> Iterator[tuple[int, list[Failure]]]:
    """Run seeds from ``first`` on in several processes; yields how many were run so far, and new failures."""
    deadline, num_run = time.monotonic() + seconds, 0
    with ProcessPoolExecutor(processes) as pool:
        jobs: dict[Future[list[Failure]], int] = {}
        while jobs or time.monotonic() < deadline:
            while len(jobs) < 2 * processes and time.monotonic() < deadline:
                jobs[pool.submit(run_seeds, first, first + _SEEDS_PER_JOB)] = first
                first += _SEEDS_PER_JOB
            for job in wait(jobs, return_when=FIRST_COMPLETED).done:
                del jobs[job]
                num_run += _SEEDS_PER_JOB
                yield num_run, job.result()


def shrink(scenario: Scenario, failure: Failure) -> Scenario:
    """Return a scenario with fewer requests and faults that fails at the same place."""
    is_smaller = True
    while is_smaller:
        is_smaller = False
        for smaller in _smaller(scenario):
            found = run(smaller)
            if found is not None and found.place == failure.place:
                scenario, is_smaller = smaller, True
                break
    return scenario


def _smaller(scenario: Scenario) -> Iterator[Scenario]:
    for name in ("faults", "requests"):
        items: tuple[Any, ...] = getattr(scenario, name)
        for size in (len(items) // 2, 1):
            for index in range(0, len(items), max(1, size)):
                yield replace(scenario, **{name: items[:index] + items[index + max(1, size) :]})  # type: ignore[arg-type]
    for index, request in enumerate(scenario.requests):
        plain = replace(request, keeps_state=False, late_masks=False, end_token=None, salt=None, abort_at=None)
        shorter = replace(request, prompt=request.prompt[: max(1, len(request.prompt) // 2)])
        for each in (plain, shorter, replace(request, max_tokens=max(1, request.max_tokens // 2))):
            if each != request:
                yield replace(scenario, requests=(*scenario.requests[:index], each, *scenario.requests[index + 1 :]))
