"""The scheduler's numbers in Prometheus' format.

The scheduler counts, and the API server translates one snapshot per scrape. Nothing is counted twice or kept between
two scrapes, and a number that the snapshot lacks is left out. Names follow https://prometheus.io/docs/practices/naming/:
base units, ``_total`` for counters.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector, CollectorRegistry

_OUTCOMES = ("completed", "failed", "aborted", "refused")
_HISTOGRAMS = {
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
_REQUEST_COUNTS = {
    "preemptions": "Requests that gave their place to an older one.",
    "retries": "Attempts of requests that failed and were made again.",
    "prompt_tokens": "Prompt tokens of admitted requests.",
    "cached_prompt_tokens": "Of these, found in the prefix cache.",
    "generated_tokens": "Output tokens.",
}
_INSTANCE_COUNTS = (
    ("steps", "steps", "Steps done."),
    ("generated_tokens", "generated_tokens", "Output tokens made there."),
    ("busy_seconds", "busy_s", "Time in which its device worked on steps."),
    ("host_seconds", "host_s", "Time in which its host prepared and launched steps."),
    ("restarts", "restarts", "How often it has come back."),
)
_LINK_COUNTS = (
    ("transfers", "transfers", "KV transfers done."),
    ("transfer_bytes", "bytes", "Bytes of KV moved."),
    ("transfer_seconds", "seconds", "Moving them."),
    ("transfer_queued_seconds", "queued_s", "Waiting for other transfers."),
    ("transfer_exposed_seconds", "exposed_s", "From first tokens to last blocks."),
)
_TIER_COUNTS = (
    ("stored_blocks", "stored_blocks", "KV blocks copied to a tier."),
    ("stored_bytes", "stored_bytes", "Their bytes."),
    ("store_seconds", "store_s", "Copying them."),
    ("loaded_blocks", "loaded_blocks", "KV blocks copied back from a tier."),
    ("loaded_bytes", "loaded_bytes", "Their bytes."),
    ("load_seconds", "load_s", "Copying them."),
    ("saved_prompt_tokens", "saved_prompt_tokens", "Prompt tokens that were loaded instead of computed."),
    ("evicted_blocks", "evicted_blocks", "KV blocks that gave their place in a tier to others."),
    ("skipped_blocks", "skipped_blocks", "KV blocks that were not stored, because the tier was behind or full."),
)
_ROTATION_COUNTS = {
    "rotations": "Splits that were changed.",
    "failed_rotations": "Changes whose workers were not ready in time.",
    "replaced_workers": "Workers that ended and were replaced.",
    "recoveries": "Losses of the memory that were recovered from.",
}

_DRAFT_COUNTS = {
    "drafts": "Verified drafts of speculative decoding.",
    "drafted_tokens": "Guessed tokens that steps have verified.",
    "accepted_tokens": "Guessed tokens that were right.",
}
_FORMATS = ("dtype", "weights", "kv_cache_dtype")
Samples = Iterable[tuple[Sequence[str], float]]
"""Values of a metric, each with those of its labels."""


def render(stats: dict[str, Any], accept: str, rotations: Mapping[str, dict[str, Any]]) -> tuple[bytes, str]:
    """Answer one scrape.

    Args:
        stats: as returned by ``get_system_stats()``.
        accept: the request's Accept header, which chooses between the text formats.
        rotations: by name of ``semi_pd`` instances, the ``statistics`` of `ProcessRotationManager.get_status`.

    Returns:
        The document and its content type.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshot(stats, rotations))
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


class _Snapshot(Collector):
    """One snapshot as metric families."""

    def __init__(self, stats: dict[str, Any], rotations: Mapping[str, dict[str, Any]]) -> None:
        self._stats, self._rotations = stats, rotations

    def collect(self) -> Iterator[Metric]:
        """Yield all families."""
        metrics: dict[str, Any] = self._stats.get("metrics", {})
        instances: dict[str, dict[str, Any]] = self._stats.get("gpu_instances", {})
        yield from _requests(self._stats.get("cpu_scheduler", {}), metrics)
        yield from _instances(instances)
        yield from _links(self._stats.get("kv_transfer", {}).get("links", {}))
        yield from _tiers(self._stats.get("kv_tiers", {}))
        if "events" in self._stats:
            kinds = [([kind], number) for kind, number in self._stats["events"].items()]
            yield _counter("events", "Events of the system, by kind.", ["kind"], kinds)
        if self._rotations:
            yield from _shared_devices(self._rotations, instances)
        for name, histogram in metrics.get("histograms", {}).items():
            yield _histogram(name, histogram)


def _requests(counts: dict[str, Any], metrics: dict[str, Any]) -> Iterator[Metric]:
    outcomes = [([outcome], counts[key]) for outcome in _OUTCOMES if (key := f"{outcome}_requests") in counts]
    yield _counter("requests", "Requests that have ended, by outcome.", ["outcome"], outcomes)
    with_targets = [([result], number) for result, number in metrics.get("requests_with_targets", {}).items()]
    yield _counter("requests_with_targets", "Completed requests that had latency targets.", ["result"], with_targets)
    for name, text in _REQUEST_COUNTS.items():
        if name in counts:
            yield _counter(name, text, [], [([], counts[name])])
    speculation: dict[str, dict[str, int]] = counts.get("speculation", {})
    for name, text in _DRAFT_COUNTS.items():
        drafters = [([drafter], numbers[name]) for drafter, numbers in speculation.items()]
        yield _counter(f"speculation_{name}", text, ["drafter"], drafters)
    if "uptime_s" in counts:
        yield _gauge("uptime_seconds", "Of the scheduler.", [], [([], counts["uptime_s"])])
    state = metrics.get("queues")
    if state is None:
        return
    by_phase = [([phase], number) for phase, number in state["requests"].items()]
    yield _gauge("open_requests", "Requests that have not ended.", ["phase"], by_phase)
    yield _gauge("waiting_prompt_tokens", "Tokens of waiting requests.", [], [([], state["waiting_tokens"])])
    yield _gauge(
        "oldest_wait_seconds", "How long the oldest waiting request waits.", [], [([], state["oldest_wait_s"])]
    )


def _instances(instances: dict[str, dict[str, Any]]) -> Iterator[Metric]:
    labels = ["instance", "role"]
    labelled = [([name, instance["role"]], instance) for name, instance in instances.items()]
    pools = [(values, instance["kv_blocks"]) for values, instance in labelled if "kv_blocks" in instance]
    up = [(values, instance["status"] == "ready") for values, instance in labelled]
    active = [(values, instance.get("active_requests", 0)) for values, instance in labelled]
    blocks = [([*values, state], pool[state]) for values, pool in pools for state in ("total", "free", "cached")]
    usage = [(values, 1 - pool["free"] / pool["total"]) for values, pool in pools]
    formats = [
        ([*values, instance["device"], *instance["formats"].values()], 1)
        for values, instance in labelled
        if "formats" in instance
    ]
    yield _gauge("instance_info", "What it serves, and on what.", [*labels, "device", *_FORMATS], formats)
    yield _gauge("instance_up", "Whether it can be given work.", labels, up)
    yield _gauge("instance_active_requests", "Requests with an allocation there.", labels, active)
    yield _gauge("kv_blocks", "KV blocks, by state.", [*labels, "state"], blocks)
    yield _gauge("kv_usage_ratio", "Share of the KV blocks in use.", labels, usage)
    for name, key, text in _INSTANCE_COUNTS:
        counts = [(values, instance[key]) for values, instance in labelled if key in instance]
        yield _counter(f"instance_{name}", text, labels, counts)
    experts = [
        ([*values, layer, of], number)
        for values, instance in labelled
        for layer, numbers in instance.get("expert_tokens", {}).items()
        for of, number in numbers.items()
    ]
    text = "Tokens that the most and the least loaded expert of a layer computed, and the mean of all."
    yield _counter("expert_tokens", text, [*labels, "layer", "of"], experts)


def _links(links: dict[str, dict[str, Any]]) -> Iterator[Metric]:
    labels = ["source", "target"]
    labelled = [(name.split("->"), link) for name, link in links.items()]
    for name, key, text in _LINK_COUNTS:
        yield _counter(f"kv_{name}", text, labels, [(values, link[key]) for values, link in labelled])
    queued = [(values, link["queued"]) for values, link in labelled]
    yield _gauge("kv_transfers_open", "KV transfers that have not ended.", labels, queued)
    failures = [([*values, kind], number) for values, link in labelled for kind, number in link["failures"].items()]
    yield _counter("kv_transfer_failures", "Links that failed, by what failed.", [*labels, "kind"], failures)


def _tiers(tiers: dict[str, dict[str, Any]]) -> Iterator[Metric]:
    for name, key, text in _TIER_COUNTS:
        yield _counter(f"kv_tier_{name}", text, ["tier"], [([tier], numbers[key]) for tier, numbers in tiers.items()])
    for name, key, text in (("blocks", "blocks", "KV blocks in a tier."), ("slots", "slots", "KV blocks that fit.")):
        yield _gauge(f"kv_tier_{name}", text, ["tier"], [([tier], numbers[key]) for tier, numbers in tiers.items()])
    failures = [([tier, kind], n) for tier, numbers in tiers.items() for kind, n in numbers["failures"].items()]
    yield _counter("kv_tier_failures", "KV blocks that a tier lost, by what went wrong.", ["tier", "kind"], failures)


def _shared_devices(rotations: Mapping[str, dict[str, Any]], instances: dict[str, dict[str, Any]]) -> Iterator[Metric]:
    """Yield how ``semi_pd`` instances divide their devices."""
    shares, busy = [], []
    for name in rotations:
        instance = instances.get(name, {})
        shares += [([name, role], percentage / 100) for role, percentage in instance.get("shares", {}).items()]
        seconds: Counter[tuple[str, str]] = Counter()  # while workers change there may be two of a percentage
        for worker in instance.get("workers", {}).values():
            seconds[worker["role"], str(worker["percentage"])] += worker["busy_s"]
        busy += [([name, *worker], busy_s) for worker, busy_s in seconds.items()]
    mixed = [([name], instances.get(name, {}).get("is_mixed", False)) for name in rotations]
    yield _gauge("semi_pd_share_ratio", "Of the device, while both phases are busy.", ["instance", "role"], shares)
    yield _gauge("semi_pd_mixed", "Whether one worker does both phases.", ["instance"], mixed)
    text = "Time in which the device worked on a worker's steps."
    yield _counter("semi_pd_worker_busy_seconds", text, ["instance", "role", "percentage"], busy)
    for key, text in _ROTATION_COUNTS.items():
        counts = [([name], statistics[key]) for name, statistics in rotations.items()]
        yield _counter(f"semi_pd_{key}", text, ["instance"], counts)


def _counter(name: str, text: str, labels: list[str], samples: Samples) -> Metric:
    family = CounterMetricFamily(f"hbserve_{name}", text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family


def _gauge(name: str, text: str, labels: list[str], samples: Samples) -> Metric:
    family = GaugeMetricFamily(f"hbserve_{name}", text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family


def _histogram(name: str, histogram: dict[str, Any]) -> Metric:
    bounds = [*(str(float(bound)) for bound in histogram["bounds"]), "+Inf"]
    family = HistogramMetricFamily(f"hbserve_{name}", _HISTOGRAMS[name])
    family.add_metric([], list(zip(bounds, itertools.accumulate(histogram["counts"]), strict=True)), histogram["sum"])
    return family
