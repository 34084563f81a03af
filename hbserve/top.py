"""A running server in the terminal: ``hbserve top [--url http://127.0.0.1:8000]``.

It reads requests, latencies and instances from ``/stats``, and the split and rotations of ``semi_pd`` instances from
``/v1/semi_pd/status``. It draws them every second until Ctrl-C. Once it has drawn a picture, it waits for a server that
does not answer: it may be restarting.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import urllib.request
from collections.abc import Sequence
from typing import Any

from hbserve.errors import ConfigError
from hbserve.server_url import server_url

_CLEAR = "\x1b[H\x1b[2J"
_BAR_WIDTH = 20
_TIMEOUT_S = 5.0


def draw(stats: dict[str, Any], semi_pd: dict[str, Any]) -> str:
    """Draw one moment.

    Args:
        stats: answer of ``/stats``.
        semi_pd: answer of ``/v1/semi_pd/status``.
    """
    scheduler, window = stats["cpu_scheduler"], stats["metrics"]["window"]
    lines = [
        f"HBServe, up {scheduler['uptime_s']:.0f} s",
        f"requests   open {scheduler['open_requests']}, waiting {scheduler['waiting_requests']}, "
        f"completed {scheduler['completed_requests']}, failed {scheduler['failed_requests']}",
        f"throughput {window['prefill_throughput']:.0f} prompt tokens/s, {window['decode_throughput']:.0f} tokens/s",
    ]
    drafters = {name: counts for name, counts in scheduler["speculation"].items() if counts["drafted_tokens"]}
    if drafters:
        shares = [f"{name} {one['accepted_tokens'] / one['drafted_tokens']:.0%}" for name, one in drafters.items()]
        num_right, num_drafts = (sum(one[key] for one in drafters.values()) for key in ("accepted_tokens", "drafts"))
        lines.append(f"drafts     {num_right / num_drafts:.1f} tokens right of each ({', '.join(shares)})")
    for name in ("ttft", "tpot", "itl"):
        percentiles = {percent: window[f"{name}_p{percent}_ms"] for percent in (50, 95, 99)}
        values = ", ".join(f"p{percent} {value:.1f}" for percent, value in percentiles.items())
        lines.append(f"{name.upper():<10} {f'{values} ms' if any(percentiles.values()) else 'no recent samples'}")
    for name, instance in stats["gpu_instances"].items():
        lines += ["", f"{name} ({instance['role']}, {instance['status']}): {instance.get('device', '')}"]
        blocks = instance.get("kv_blocks")
        if blocks is not None:
            used = 1 - blocks["free"] / blocks["total"]
            lines.append(f"  KV cache {_bar(used)} {used:.0%} of {blocks['total']} blocks")
        lines += _workers(instance)
        if name in semi_pd.get("instances", {}):
            lines += _rotation(semi_pd["instances"][name])
    return "\n".join(lines) + "\n"


def _bar(share: float) -> str:
    full = round(min(max(share, 0.0), 1.0) * _BAR_WIDTH)
    return "█" * full + "░" * (_BAR_WIDTH - full)


def _workers(instance: dict[str, Any]) -> list[str]:
    workers = sorted(instance.get("workers", {}).values(), key=lambda worker: (worker["role"], worker["percentage"]))
    return [
        f"  {'▶' if worker['is_current'] else ' '} {worker['role']:<8} {_bar(worker['percentage'] / 100)} "
        f"{worker['percentage']:>3} %  {worker['status']:<9} steps {worker['steps']}, "
        f"in flight {worker['steps_in_flight']}"
        for worker in workers
    ]


def _rotation(status: dict[str, Any]) -> list[str]:
    split, counts = status["current_sm_allocation"], status["statistics"]
    requested, change = status["requested_sm_allocation"], ""
    if requested is not None:
        change = f" → {_split(requested)} ({status['delayed_switching']['state']})"
    lines = [
        f"  split {_split(split)}{change}, standby workers {len(status['sleepers'])}",
        f"  rotations {counts['rotations']} (failed {counts['failed_rotations']}), "
        f"replaced workers {counts['replaced_workers']}, recoveries {counts['recoveries']}",
    ]
    if status["last_error"]:
        lines.append(f"  last error: {status['last_error']}")
    return lines


def _split(allocation: dict[str, Any]) -> str:
    shares = f"{allocation['prefill_percentage']} / {allocation['decode_percentage']} %"
    return f"mixed (else {shares})" if allocation["mixed"] else shares


def _get(url: str, key: str | None) -> dict[str, Any]:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_S) as response:
        return json.load(response)  # type: ignore[no-any-return]


def main(arguments: Sequence[str] | None = None, prog: str = "python -m hbserve.top") -> int:
    """Draw until Ctrl-C; return the exit code."""
    parser = argparse.ArgumentParser(prog=prog, description="A running server in the terminal.")
    parser.add_argument(
        "--url", default="http://127.0.0.1:8000", help="address of the server; HBSERVE_API_KEY holds the key"
    )
    parser.add_argument("--interval-s", type=float, default=1.0, help="seconds between pictures")
    parser.add_argument("--once", action="store_true", help="one picture, without clearing the screen")
    given = parser.parse_args(arguments)
    try:
        base = server_url(given.url).geturl()
    except ConfigError as error:
        parser.error(str(error))
    if not 0 < given.interval_s < float("inf"):
        parser.error("--interval-s must be positive")
    key = os.environ.get("HBSERVE_API_KEY")
    has_answered = False
    try:
        while True:
            try:
                picture = draw(_get(f"{base}/stats", key), _get(f"{base}/v1/semi_pd/status", key))
            except (OSError, ValueError, LookupError) as error:  # no server, no JSON, or other JSON than HBServe's
                reason = getattr(error, "reason", None) or repr(error)
                problem = f"{base} does not answer like a server of HBServe: {reason}"
                if getattr(error, "code", None) == 401:
                    problem = f"{base} refuses the key: set HBSERVE_API_KEY to one that it knows"
                if not has_answered:
                    print(f"error: {problem}", file=sys.stderr)
                    return 1
                picture = f"{problem}\nwaiting for it; Ctrl-C ends\n"
            has_answered = True
            sys.stdout.write(picture if given.once else _CLEAR + picture)
            sys.stdout.flush()
            if given.once:
                return 0
            time.sleep(given.interval_s)
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
