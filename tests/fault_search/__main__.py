"""Command line of the fault search; see the package's docstring."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace

from tests.fault_search.scenario import draw
from tests.fault_search.search import run, search, shrink


def main() -> int:
    """Return the exit code: 1 if a seed failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fault_search", description=__doc__)
    parser.add_argument("--seed", type=int, help="run this seed alone and print its trace")
    parser.add_argument("--shrink", action="store_true", help="with --seed: find a smaller scenario first")
    parser.add_argument("--first", type=int, default=2000, help="first seed of a search (CI runs those below 2000)")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to search")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    if options.seed is not None:
        return _replay(options.seed, options.shrink)
    num_failed = num_run = 0
    for num_run_so_far, failures in search(options.first, options.seconds, options.processes):
        num_run = num_run_so_far
        num_failed += len(failures)
        for failure in failures:
            print(f"seed {failure.seed}: {failure}", flush=True)
    print(f"{num_run} seeds from {options.first} on, {num_failed} failed")
    return 1 if num_failed else 0


def _replay(seed: int, smaller: bool) -> int:
    scenario = draw(seed)
    failure = run(scenario)
    if failure is not None and smaller:
        scenario = shrink(scenario, failure)
    settings = replace(scenario, requests=(), faults=())
    print(*(settings, *scenario.requests, *scenario.faults), sep="\n")
    failure = run(scenario, print)
    print("nothing wrong" if failure is None else failure)
    return 0 if failure is None else 1


if __name__ == "__main__":
    sys.exit(main())
