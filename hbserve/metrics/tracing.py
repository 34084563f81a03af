"""The phases of a request as OpenTelemetry spans, sent after its end.

The scheduler makes the spans; a thread of the OpenTelemetry SDK in the scheduler's process sends them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from hbserve.errors import ConfigError
from hbserve.metrics.request_metrics import RequestMetrics

if TYPE_CHECKING:
    from opentelemetry.trace import Span

_EXPORT_TIMEOUT_S = 2.0


class RequestTracer:
    """The sender of one trace per request: ``request``, and in it ``queue``, ``prefill``, ``handover``, ``decode``.

    Spans are made from a request's record after its end, and sent in batches by a thread of the SDK. The scheduler
    therefore never waits for the receiver. Spans that cannot be delivered are dropped.

    Args:
        endpoint: URL of an OTLP/HTTP receiver of traces, such as ``http://127.0.0.1:4318/v1/traces``.
        clock: clock of the records; it is compared with the time of day once, here.

    Raises:
        ConfigError: the OpenTelemetry SDK is not installed.
    """

    def __init__(self, endpoint: str, clock: Callable[[], float]) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ConfigError(
                f"telemetry.otlp_endpoint: {error.name} is missing; pip install 'hbserve[telemetry]'",
                "telemetry.otlp_endpoint",
            ) from None
        self._provider = TracerProvider(resource=Resource.create({"service.name": "hbserve"}), shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=endpoint, timeout=_EXPORT_TIMEOUT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("hbserve")
        self._offset_ns = time.time_ns() - round(clock() * 1e9)

    def record(self, request_id: str, request: RequestMetrics, outcome: str) -> None:
        """Send the trace of an ended request.

        Args:
            request_id: the client's id of the request.
            outcome: ``completed``, ``aborted`` or ``failed``.
        """
        from opentelemetry.trace import Status, StatusCode, set_span_in_context

        assert request.completion_time is not None
        # names of https://opentelemetry.io/docs/specs/semconv/gen-ai/ where there are any
        attributes: dict[str, str | int | float] = {
            "gen_ai.usage.input_tokens": request.input_length,
            "gen_ai.usage.output_tokens": request.output_length,
            "hbserve.request_id": request_id,
            "hbserve.outcome": outcome,
            "hbserve.cached_tokens": request.cached_tokens,
            "hbserve.preemptions": request.num_preemptions,
            "hbserve.retries": request.num_retries,
        }
        for name in ("ttft_ms", "tpot_ms", "ttft_target_ms", "tpot_target_ms"):
            value = getattr(request, name)
            if value is not None:
                attributes[f"hbserve.{name}"] = value
        root = self._tracer.start_span("request", start_time=self._at(request.arrival_time), attributes=attributes)
        if outcome == "failed":
            root.set_status(Status(StatusCode.ERROR))
        if request.first_token_time is not None:
            root.add_event("first token", timestamp=self._at(request.first_token_time))
        context = set_span_in_context(root)
        moments = (
            ("queue", request.arrival_time, request.prefill_start_time),
            ("prefill", request.prefill_start_time, request.prefill_end_time),
            ("handover", request.prefill_end_time, request.decode_start_time),
            ("decode", request.decode_start_time, request.completion_time),
        )
        for name, start, end in moments:
            if start is None:
                continue
            # the request ended in a phase that has no end
            ended = request.completion_time if end is None else end
            if ended > start or end is None or name != "handover":  # a worker that does both phases hands nothing over
                span: Span = self._tracer.start_span(name, context=context, start_time=self._at(start))
                span.end(self._at(ended))
            if end is None:
                break
        root.end(self._at(request.completion_time))

    def close(self) -> None:
        """Send the remaining spans; this takes seconds if the receiver does not answer."""
        self._provider.shutdown()

    def _at(self, seconds: float) -> int:
        return round(seconds * 1e9) + self._offset_ns
