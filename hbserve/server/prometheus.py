"""The scheduler's numbers in Prometheus' format.

The scheduler counts and the API server translates: nothing here is counted twice or kept between two
scrapes, and what a scheduler's statistics do not have is left out. Names follow
https://prometheus.io/docs/practices/naming/: base units, ``_total`` for counters.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector, CollectorRegistry

_REQUESTS = {
    # outcome -> key of the scheduler's books
    "completed": "completed_requests",
    "failed": "failed_requests",
    "aborted": "aborted_requests",
    "refused": "refused_requests",
}
_HELP = {
    "time_to_first_token_seconds": "From a request's arrival to its first token.",
    "time_per_output_token_seconds": "Mean over a request's tokens after the first.",
    "inter_token_latency_seconds": "Between two tokens of a request.",
    "e2e_request_latency_seconds": "From a request's arrival to its end.",
    "prefill_queue_seconds": "From a request's arrival to its allocation.",
    "decode_queue_seconds": "From the end of a prompt until it may decode.",
    "prompt_length_tokens": "Prompt tokens of a request.",
    "output_length_tokens": "Output tokens of a completed request.",
    "prefill_batch_size": "Prompts in a step.",
    "decode_batch_size": "Decoding sequences in a step.",
}


def render(stats: dict[str, Any], accept: str, rotations: Mapping[str, dict[str, Any]]) -> tuple[bytes, str]:
    """One scrape.

    Args:
        stats: as ``get_system_stats()``.
        accept: the request's Accept header, which chooses between the text formats.
        rotations: by name of ``semi_pd`` instances, the ``statistics`` of `ProcessRotationManager.get_status`.

    Returns:
        The document and its content type.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Translation(stats, rotations))
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


class _Translation(Collector):
    """One snapshot as metric families."""

    def __init__(self, stats: dict[str, Any], rotations: Mapping[str, dict[str, Any]]) -> None:
        self._stats, self._rotations = stats, rotations

    def describe(self) -> Iterable[Metric]:
        """Nothing before the scrape."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """All families."""
        yield from self._requests()
        yield from self._instances()
        yield from self._links()
        if self._rotations:
            yield from self._shared_devices()
        for name, histogram in self._metrics.get("histograms", {}).items():
            yield _histogram(name, histogram)

    @property
    def _metrics(self) -> dict[str, Any]:
        metrics: dict[str, Any] = self._stats.get("metrics", {})
        return metrics

    def _requests(self) -> Iterator[Metric]:
        scheduler: dict[str, Any] = self._stats.get("cpu_scheduler", {})
        requests = CounterMetricFamily("hbserve_requests", "Requests that have ended, by outcome.", labels=["outcome"])
        for outcome, key in _REQUESTS.items():
            if key in scheduler:
                requests.add_metric([outcome], scheduler[key])
        yield requests
        with_targets = CounterMetricFamily(
            "hbserve_requests_with_targets", "Completed requests that had latency targets.", labels=["result"]
        )
        for result, number in self._metrics.get("requests_with_targets", {}).items():
            with_targets.add_metric([result], number)
        yield with_targets
        for name, key, text in (
            ("preemptions", "preemptions", "Requests that gave their place to an older one."),
            ("retries", "retries", "Attempts of requests that failed and were made again."),
            ("prompt_tokens", "prompt_tokens", "Prompt tokens of admitted requests."),
            ("cached_prompt_tokens", "cached_prompt_tokens", "Of these, found in the prefix cache."),
            ("generated_tokens", "generated_tokens", "Output tokens."),
        ):
            if key in scheduler:
                yield CounterMetricFamily(f"hbserve_{name}", text, value=scheduler[key])
        if "uptime_s" in scheduler:
            yield GaugeMetricFamily("hbserve_uptime_seconds", "Of the scheduler.", value=scheduler["uptime_s"])
        state = self._metrics.get("queues")
        if state is None:
            return
        by_phase = GaugeMetricFamily("hbserve_open_requests", "Requests that have not ended.", labels=["phase"])
        for phase, number in state["requests"].items():
            by_phase.add_metric([phase], number)
        yield by_phase
        yield GaugeMetricFamily(
            "hbserve_waiting_prompt_tokens", "Tokens of waiting requests.", value=state["waiting_tokens"]
        )
        yield GaugeMetricFamily(
            "hbserve_oldest_wait_seconds", "How long the oldest waiting request waits.", value=state["oldest_wait_s"]
        )

    def _instances(self) -> Iterator[Metric]:
        labels = ["instance", "role"]
        instances = [
            ([name, instance["role"]], instance) for name, instance in self._stats.get("gpu_instances", {}).items()
        ]

        def counter(name: str, text: str, key: str) -> Metric:
            family = CounterMetricFamily(f"hbserve_instance_{name}", text, labels=labels)
            for values, instance in instances:
                if key in instance:
                    family.add_metric(values, instance[key])
            return family

        up = GaugeMetricFamily("hbserve_instance_up", "Whether it can be given work.", labels=labels)
        active = GaugeMetricFamily(
            "hbserve_instance_active_requests", "Requests with an allocation there.", labels=labels
        )
        blocks = GaugeMetricFamily("hbserve_kv_blocks", "KV blocks, by state.", labels=[*labels, "state"])
        usage = GaugeMetricFamily("hbserve_kv_usage_ratio", "Share of the KV blocks in use.", labels=labels)
        for values, instance in instances:
            up.add_metric(values, instance["status"] == "ready")
            active.add_metric(values, instance.get("active_requests", 0))
            if "kv_blocks" in instance:
                kv = instance["kv_blocks"]
                for state in ("total", "free", "cached"):
                    blocks.add_metric([*values, state], kv[state])
                usage.add_metric(values, 1 - kv["free"] / kv["total"])
        yield from (up, active, blocks, usage)
        yield counter("steps", "Steps done.", "steps")
        yield counter("generated_tokens", "Output tokens made there.", "generated_tokens")
        yield counter("busy_seconds", "Time in which its device worked on steps.", "busy_s")
        yield counter("host_seconds", "Time in which its host prepared and launched steps.", "host_s")
        yield counter("restarts", "How often it has come back.", "restarts")

    def _links(self) -> Iterator[Metric]:
        labels = ["source", "target"]
        links: dict[str, dict[str, Any]] = self._stats.get("kv_transfer", {}).get("links", {})
        families = {
            "transfers": CounterMetricFamily("hbserve_kv_transfers", "KV transfers done.", labels=labels),
            "bytes": CounterMetricFamily("hbserve_kv_transfer_bytes", "Bytes of KV moved.", labels=labels),
            "seconds": CounterMetricFamily("hbserve_kv_transfer_seconds", "Moving them.", labels=labels),
            "queued_s": CounterMetricFamily(
                "hbserve_kv_transfer_queued_seconds", "Waiting for other transfers.", labels=labels
            ),
            "exposed_s": CounterMetricFamily(
                "hbserve_kv_transfer_exposed_seconds", "From first tokens to last blocks.", labels=labels
            ),
        }
        under_way = GaugeMetricFamily("hbserve_kv_transfers_open", "KV transfers that have not ended.", labels=labels)
        failures = CounterMetricFamily(
            "hbserve_kv_transfer_failures", "Links that failed, by what failed.", labels=[*labels, "kind"]
        )
        for name, link in links.items():
            values = name.split("->")
            for key, family in families.items():
                family.add_metric(values, link[key])
            under_way.add_metric(values, link["queued"])
            for kind, number in link["failures"].items():
                failures.add_metric([*values, kind], number)
        yield from families.values()
        yield from (under_way, failures)

    def _shared_devices(self) -> Iterator[Metric]:
        """How ``semi_pd`` instances divide their devices."""
        labels = ["instance"]
        share = GaugeMetricFamily(
            "hbserve_semi_pd_share_ratio", "Of the device, while both phases are busy.", labels=[*labels, "role"]
        )
        mixed = GaugeMetricFamily("hbserve_semi_pd_mixed", "Whether one worker does both phases.", labels=labels)
        busy = CounterMetricFamily(
            "hbserve_semi_pd_worker_busy_seconds",
            "Time in which the device worked on a worker's steps.",
            labels=[*labels, "role", "percentage"],
        )
        counters = {
            "rotations": CounterMetricFamily("hbserve_semi_pd_rotations", "Splits that were changed.", labels=labels),
            "failed_rotations": CounterMetricFamily(
                "hbserve_semi_pd_failed_rotations", "Changes whose workers were not ready in time.", labels=labels
            ),
            "replaced_workers": CounterMetricFamily(
                "hbserve_semi_pd_replaced_workers", "Workers that ended and were replaced.", labels=labels
            ),
            "recoveries": CounterMetricFamily(
                "hbserve_semi_pd_recoveries", "Losses of the memory that were recovered from.", labels=labels
            ),
        }
        for name, statistics in self._rotations.items():
            instance = self._stats["gpu_instances"].get(name, {})
            for role, percentage in instance.get("shares", {}).items():
                share.add_metric([name, role], percentage / 100)
            mixed.add_metric([name], instance.get("is_mixed", False))
            seconds: Counter[tuple[str, str]] = Counter()  # while workers change there may be two of a percentage
            for worker in instance.get("workers", {}).values():
                seconds[worker["role"], str(worker["percentage"])] += worker["busy_s"]
            for (role, percentage), busy_s in seconds.items():
                busy.add_metric([name, role, percentage], busy_s)
            for key, family in counters.items():
                family.add_metric([name], statistics[key])
        yield from (share, mixed, busy, *counters.values())


def _histogram(name: str, histogram: dict[str, Any]) -> Metric:
    bounds = [*(str(float(bound)) for bound in histogram["bounds"]), "+Inf"]
    family = HistogramMetricFamily(f"hbserve_{name}", _HELP[name])
    family.add_metric([], list(zip(bounds, itertools.accumulate(histogram["counts"]), strict=True)), histogram["sum"])
    return family
