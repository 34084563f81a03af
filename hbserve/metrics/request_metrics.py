"""The times of one request."""

from __future__ import annotations

from dataclasses import dataclass, field


class _Milliseconds:
    """The time between two events of a request, as an attribute; None until both have happened."""

    def __init__(self, start: str, end: str) -> None:
        self._start, self._end = start, end

    def __get__(self, request: RequestMetrics, owner: type) -> float | None:
        start: float | None = getattr(request, self._start)
        end: float | None = getattr(request, self._end)
        return None if start is None or end is None else (end - start) * 1000


@dataclass(slots=True)
class RequestMetrics:
    """One request's life. Times are seconds on the collector's clock, None until the event has happened.

    Attributes:
        input_length: prompt tokens.
        output_length: generated tokens; final once the request is complete.
        cached_tokens: prompt tokens whose KV was in the prefix cache.
        prefill_start_time: the request got its allocations. Before this it was queued.
        first_token_time: the end of TTFT.
        prefill_end_time: the prompt is computed. From here to ``decode_start_time`` the KV is handed over to the
            decode worker, by a transfer if that is another worker.
        chunk_end_times: ends of the chunks in which the prompt was computed.
        success: None while the request is open.
        num_preemptions: how often the request gave its place to an older one.
        num_retries: how often an attempt failed.
        ttft_target_ms, tpot_target_ms: latency targets; None for no target.
        is_batch: whether the request is best-effort.
    """

    request_id: str
    input_length: int
    arrival_time: float
    output_length: int = 0
    cached_tokens: int = 0
    prefill_start_time: float | None = None
    first_token_time: float | None = None
    prefill_end_time: float | None = None
    decode_start_time: float | None = None
    completion_time: float | None = None
    success: bool | None = None
    chunk_end_times: list[float] = field(default_factory=list)
    num_preemptions: int = 0
    num_retries: int = 0
    ttft_target_ms: float | None = None
    tpot_target_ms: float | None = None
    is_batch: bool = False

    ttft_ms = _Milliseconds("arrival_time", "first_token_time")
    prefill_queue_ms = _Milliseconds("arrival_time", "prefill_start_time")
    prefill_ms = _Milliseconds("prefill_start_time", "prefill_end_time")
    decode_queue_ms = _Milliseconds("prefill_end_time", "decode_start_time")
    e2e_ms = _Milliseconds("arrival_time", "completion_time")
    _decode_ms = _Milliseconds("first_token_time", "completion_time")

    @property
    def tpot_ms(self) -> float | None:
        """Time per output token after the first, over the whole output; None for outputs of one token."""
        decode_ms = self._decode_ms
        return None if decode_ms is None or self.output_length < 2 else decode_ms / (self.output_length - 1)

    @property
    def meets_targets(self) -> bool | None:
        """Whether the request kept all of its targets; None if it has none or did not succeed."""
        targets = ((self.ttft_ms, self.ttft_target_ms), (self.tpot_ms, self.tpot_target_ms))
        kept = [measured is None or measured <= target for measured, target in targets if target is not None]
        return all(kept) if kept and self.success else None
