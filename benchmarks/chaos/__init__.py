"""``python -m benchmarks chaos``: a hostile stranger against the real thing, from a seed, for as long as one likes.

    kills       signals to every kind of process while clients stream
    requests    malformed HTTP requests to every endpoint
    configs     mutated configuration files
    folders     mutated model folders

A case that fails prints the command that runs it again; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.chaos.campaign import Campaign, ChaosError
from hbserve.bench.arguments import check_new_file, positive, positive_float
from hbserve.errors import ConfigError

KINDS = {"kills": 500, "requests": 10_000, "configs": 2_000, "folders": 1_000}
"""Sub-commands, with the number of cases unless another is asked for."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments; see `run`."""
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"any of {', '.join(KINDS)}; default: all")
    parser.add_argument("--seed", type=int, default=1, help="determines everything that is random in a case")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first case")
    parser.add_argument("--count", type=positive, metavar="N", help="cases of each kind; default: by kind")
    parser.add_argument("--minutes", type=positive_float, metavar="M", help="maximum of minutes for each kind")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the cases, print each finding as soon as it is known, and return the figures by kind.

    Raises:
        ChaosError: if a case failed.
        ConfigError: naming the argument that cannot be honoured.
    """
    check_new_file("--json", arguments.json)
    results: dict[str, Any] = {}
    for kind in arguments.kinds or KINDS:
        if kind not in KINDS:
            raise ConfigError(f"unknown kind of cases {kind!r}; the kinds are: {', '.join(KINDS)}")
    for kind in arguments.kinds or KINDS:
        campaign = Campaign(kind, arguments.seed, arguments.first, arguments.count or KINDS[kind], arguments.minutes)
        cases: Callable[[Campaign, Path], None] = import_module(f"benchmarks.chaos.{kind}").run
        try:
            with tempfile.TemporaryDirectory(prefix="hbc-") as folder:
                cases(campaign, Path(folder))
        finally:
            results[kind] = campaign.result()
            shown = {name: value for name, value in results[kind].items() if not isinstance(value, list)}
            print(f"{kind}: {shown}; {len(campaign.failures)} failures", flush=True)
            if arguments.json is not None:
                arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    num_failures = sum(len(result["failures"]) for result in results.values())
    if num_failures:
        raise ChaosError(f"{num_failures} failures; see above")
    return results
