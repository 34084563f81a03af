"""What an operator wants to see of the recent past: requests through their phases, and events."""

from __future__ import annotations

import itertools
import time
from collections import deque
from itertools import islice
from typing import Any

from hbserve.metrics.collector import SemiPDMetricsCollector
from hbserve.metrics.request_metrics import RequestMetrics

MAX_EVENTS = 200
MAX_REQUESTS = 40


class EventLog:
    """The last events of a system: instances that come and go, roles, rotations, faults."""

    def __init__(self) -> None:
        self._events: deque[dict[str, Any]] = deque(maxlen=MAX_EVENTS)
        self._numbers = itertools.count(1)

    def note(self, kind: str, subject: str, text: str) -> None:
        """Add one.

        Args:
            kind: ``ready``, ``lost``, ``retired``, ``left``, ``role``, ``rotation`` or ``fault``.
            subject: whom it is about.
        """
        self._events.append(
            {"number": next(self._numbers), "time": time.time(), "kind": kind, "subject": subject, "text": text}
        )

    def as_list(self) -> list[dict[str, Any]]:
        """Plain data, oldest first; ``time`` in seconds since 1970."""
        return list(self._events)


def recent_requests(collector: SemiPDMetricsCollector) -> list[dict[str, Any]]:
    """Open requests and those that ended last, newest first; all times are milliseconds before now."""
    now = collector.clock()
    newest_open = islice(reversed(collector.open_requests.values()), MAX_REQUESTS)
    newest_ended = islice(reversed(collector.history), MAX_REQUESTS)
    requests = sorted([*newest_open, *newest_ended], key=lambda request: -request.arrival_time)
    return [_request(request, now) for request in requests[:MAX_REQUESTS]]


def _request(request: RequestMetrics, now: float) -> dict[str, Any]:
    def ago_ms(moment: float | None) -> float | None:
        return None if moment is None else round((now - moment) * 1000, 2)

    return {
        "id": request.request_id,
        "prompt_tokens": request.input_length,
        "cached_tokens": request.cached_tokens,
        "output_tokens": request.output_length,
        "arrived": ago_ms(request.arrival_time),
        "seated": ago_ms(request.prefill_start_time),
        "chunks": [ago_ms(moment) for moment in request.chunk_end_times],
        "prefilled": ago_ms(request.prefill_end_time),
        "decode_began": ago_ms(request.decode_start_time),
        "ended": ago_ms(request.completion_time),
        "success": request.success,
        "ttft_ms": request.ttft_ms,
        "tpot_ms": request.tpot_ms,
        "preemptions": request.num_preemptions,
        "retries": request.num_retries,
    }
