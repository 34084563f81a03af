"""The trace of a request, received over HTTP as by an OpenTelemetry collector."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from hbserve import LLM, SamplingParams
from hbserve.errors import ConfigError
from hbserve.metrics.request_metrics import RequestMetrics
from hbserve.metrics.tracing import RequestTracer
from tests.support.paths import ROOT

pytest.importorskip("opentelemetry.sdk")
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

DEMO = str(ROOT / "examples" / "models" / "hbserve-demo")


@contextmanager
def receiver() -> Iterator[tuple[str, list[Any]]]:
    """A URL for traces, and the spans received there."""
    spans: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    spans.extend(scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", spans
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def attributes(span: Any) -> dict[str, Any]:
    """Return the attributes as plain values."""
    return {
        one.key: getattr(one.value, one.value.WhichOneof("value"))
        for one in span.attributes
        if one.value.WhichOneof("value")
    }


def test_phases_become_spans_at_their_times() -> None:
    handed_over = RequestMetrics(
        "1", 100, 50.0, 5, 64, 51.0, 52.5, 52.5, 53.0, 55.0, True, num_preemptions=1, ttft_target_ms=3000.0
    )
    given_up = RequestMetrics("2", 10, 60.0, completion_time=60.25, success=False)
    with receiver() as (url, spans):
        tracer = RequestTracer(url, lambda: 50.0)
        tracer.record("cmpl-1", handed_over, "completed")
        tracer.record("cmpl-2", given_up, "failed")
        tracer.close()
    roots = {attributes(span)["hbserve.request_id"]: span for span in spans if span.name == "request"}
    first, second = roots["cmpl-1"], roots["cmpl-2"]
    children = [span for span in spans if span.parent_span_id == first.span_id]
    assert all(span.trace_id == first.trace_id for span in children)

    def times(span: Any) -> tuple[float, float]:
        start, end = span.start_time_unix_nano, span.end_time_unix_nano
        return (start - first.start_time_unix_nano) / 1e9, (end - first.start_time_unix_nano) / 1e9

    assert {span.name: times(span) for span in children} == {
        "queue": (0, 1),
        "prefill": (1, 2.5),
        "handover": (2.5, 3),
        "decode": (3, 5),
    }
    assert times(first) == (0, 5)
    assert [(event.name, event.time_unix_nano - first.start_time_unix_nano) for event in first.events] == [
        ("first token", 2_500_000_000)
    ]
    seen = attributes(first)
    assert (seen["gen_ai.usage.input_tokens"], seen["gen_ai.usage.output_tokens"]) == (100, 5)
    assert (seen["hbserve.ttft_ms"], seen["hbserve.tpot_ms"], seen["hbserve.preemptions"]) == (2500, 625, 1)
    assert (seen["hbserve.ttft_target_ms"], seen["hbserve.cached_tokens"]) == (3000, 64)
    assert [(span.name, times(span)) for span in spans if span.parent_span_id == second.span_id] == [
        ("queue", (10, 10.25))
    ]
    assert second.status.code == 2
    assert attributes(second)["hbserve.outcome"] == "failed"


def test_a_system_sends_its_traces_before_it_ends() -> None:
    with receiver() as (url, spans):
        with LLM(DEMO, mode="unified", device="cpu", otlp_endpoint=url, log_level="WARNING") as llm:
            llm.generate([[5, 6, 7], [8, 9]], SamplingParams(max_tokens=3, ignore_eos=True), use_tqdm=False)
        roots = [span for span in spans if span.name == "request"]
        assert sorted(attributes(span)["gen_ai.usage.input_tokens"] for span in roots) == [2, 3]
        assert [attributes(span)["gen_ai.usage.output_tokens"] for span in roots] == [3, 3]
        for root in roots:
            inside = {span.name for span in spans if span.parent_span_id == root.span_id}
            assert inside == {"queue", "prefill", "decode"}


def test_a_missing_receiver_delays_nothing() -> None:
    with receiver() as (url, _):
        pass
    tracer = RequestTracer(url, lambda: 50.0)
    tracer.record("cmpl-1", RequestMetrics("1", 10, 60.0, completion_time=60.25, success=False), "aborted")
    tracer.close()


def test_an_invalid_endpoint_is_refused() -> None:
    with pytest.raises(ConfigError, match="otlp_endpoint: must be a URL"):
        LLM(DEMO, mode="unified", otlp_endpoint="127.0.0.1:4318")
