"""The collector's windows against values counted by hand, on a clock that the test sets."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbserve.config import InstanceRole
from hbserve.metrics.distribution import Distribution
from hbserve.semi_pd.metrics_collector import SemiPDMetricsCollector, SystemMetrics
from hbserve.semi_pd.metrics_integration import MetricsAggregator, integrate_semi_pd_metrics_with_scheduler


class Clock:
    """A clock in seconds that the test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def serve(
    collector: SemiPDMetricsCollector,
    clock: Clock,
    name: str,
    *,
    wait_s: float = 0.0,
    prefill_s: float = 0.1,
    handover_s: float = 0.0,
    decode_s: float = 0.0,
    tokens: int = 1,
    input_length: int = 10,
    success: bool = True,
) -> None:
    """Record one request from its arrival, which is now, to its end."""
    collector.record_request_arrival(name, input_length=input_length)
    clock.now += wait_s
    collector.record_prefill_start(name)
    clock.now += prefill_s
    collector.record_first_token(name)
    collector.record_prefill_end(name)
    clock.now += handover_s
    collector.record_decode_start(name)
    clock.now += decode_s
    collector.record_request_completion(name, output_length=tokens, success=success)


def test_percentiles_are_nearest_ranks_over_weights() -> None:
    assert Distribution().percentile(95) == 0
    assert Distribution().mean == 0
    even = Distribution.of((float(value), 1) for value in range(100, 0, -1))
    assert [even.percentile(p) for p in (0, 1, 50, 95, 99, 99.5, 100)] == [1, 1, 50, 95, 99, 100, 100]
    weighted = Distribution.of([(5.0, 1), (1.0, 98), (9.0, 1)])
    assert [weighted.percentile(p) for p in (50, 98, 98.5, 99, 99.1)] == [1, 1, 5, 5, 9]
    assert weighted.count == 100
    assert weighted.mean == pytest.approx(1.12)


def test_a_request_is_timed_phase_by_phase(clock: Clock) -> None:
    collector = SemiPDMetricsCollector(window_size_seconds=30.0, max_history_size=1000, clock=clock)
    serve(collector, clock, "a", wait_s=0.25, prefill_s=0.5, handover_s=0.125, decode_s=2.0, tokens=5)

    [request] = collector.history
    assert not collector.open_requests
    assert (request.ttft_ms, request.e2e_ms) == (750, 2875)
    assert request.tpot_ms == pytest.approx(2125 / 4)
    assert (request.prefill_queue_ms, request.prefill_ms, request.decode_queue_ms) == (250, 500, 125)

    metrics = collector.get_current_window_metrics()
    assert (metrics.ttft.values, metrics.tpot.values) == ((750,), (2125 / 4,))
    assert (metrics.e2e.values, metrics.prefill_queue.values, metrics.decode_queue.values) == ((2875,), (250,), (125,))
    assert (metrics.ttft_mean, metrics.ttft_p95, metrics.tpot_p99) == (750, 750, 2125 / 4)
    assert metrics.duration_s == 2.875
    assert metrics.request_throughput == pytest.approx(1 / 2.875)
    numbers = collector.get_real_time_metrics()
    assert (numbers["ttft_p95_ms"], numbers["decode_queue_mean_ms"]) == (750, 125)
    assert numbers["request_throughput"] == pytest.approx(1 / 2.875)


def test_one_token_has_no_tpot_and_a_failure_no_latency_but_ttft(clock: Clock) -> None:
    collector = SemiPDMetricsCollector(clock=clock)
    serve(collector, clock, "one", tokens=1)
    serve(collector, clock, "failed", tokens=3, decode_s=1.0, success=False)
    metrics = collector.get_current_window_metrics()
    assert (metrics.num_arrivals, metrics.num_completed, metrics.num_failed) == (2, 1, 1)
    assert (metrics.ttft.count, metrics.tpot.count, metrics.e2e.count) == (2, 0, 1)


def test_events_older_than_the_window_do_not_count(clock: Clock) -> None:
    collector = SemiPDMetricsCollector(window_size_seconds=60.0, clock=clock)
    clock.now += 0.5
    serve(collector, clock, "old", prefill_s=1.0)
    clock.now += 61
    serve(collector, clock, "new", prefill_s=0.25, input_length=7)
    metrics = collector.get_current_window_metrics()
    assert metrics.ttft.values == (250,)
    assert (metrics.num_arrivals, metrics.num_completed, metrics.input_tokens) == (1, 1, 7)
    assert 60 <= metrics.duration_s <= 61  # begins at the border of a slice


@pytest.mark.slow
def test_memory_is_bounded(clock: Clock) -> None:
    collector = SemiPDMetricsCollector(window_size_seconds=60.0, max_history_size=10, clock=clock)
    for number in range(500):
        serve(collector, clock, str(number), prefill_s=number / 1e6, input_length=2)
        collector.record_step("unified-0", 1, 2, 3, 4, 0.001)
        collector.record_token_gap(0.001, 2)
    metrics = collector.get_current_window_metrics()
    assert len(collector.history) == metrics.ttft.count == 10
    assert (metrics.num_arrivals, metrics.num_completed, metrics.input_tokens) == (500, 500, 1000)
    assert (metrics.prefill.num_tokens, metrics.decode.num_tokens, metrics.output_tokens) == (1000, 1500, 2000)
    for number in range(200_000):
        collector.record_request_arrival(f"never ends {number}", 1)
    assert len(collector.open_requests) <= 1 << 17


def test_events_of_unknown_requests_and_second_times_do_nothing(clock: Clock) -> None:
    collector = SemiPDMetricsCollector(clock=clock)
    for record in (collector.record_prefill_start, collector.record_first_token, collector.record_prefill_end):
        record("nobody")
    collector.record_decode_start("nobody")
    collector.record_preemption("nobody")
    collector.record_request_completion("nobody", output_length=1, success=True)
    collector.record_request_arrival("a", 10)
    clock.now += 1
    collector.record_prefill_start("a", cached_tokens=4)
    collector.record_first_token("a")
    collector.record_preemption("a")
    clock.now += 1
    collector.record_prefill_start("a", cached_tokens=9)  # after the preemption
    collector.record_first_token("a")
    metrics = collector.get_current_window_metrics()
    assert (metrics.ttft.values, metrics.prefill_queue.values) == ((1000,), (1000,))
    assert (metrics.num_preemptions, metrics.prefix_hit_rate) == (1, 0.4)


def test_targets_are_counted_as_met_or_missed(clock: Clock) -> None:
    collector = SemiPDMetricsCollector(clock=clock)
    for name, ttft_target_ms, tpot_target_ms in (
        ("none", None, None),
        ("both", 125.0, 1000.0),
        ("ttft missed", 124.0, 1000.0),
        ("tpot missed", None, 999.0),
    ):
        start = clock.now
        collector.record_request_arrival(name, 10, ttft_target_ms, tpot_target_ms)
        clock.now = start + 0.125
        collector.record_first_token(name)
        clock.now = start + 3.125
        collector.record_request_completion(name, output_length=4)
        clock.now = round(clock.now)
    metrics = collector.get_current_window_metrics()
    assert (metrics.num_completed, metrics.num_met, metrics.num_missed) == (4, 1, 2)


def test_steps_add_up_per_phase(clock: Clock) -> None:
    collector = SemiPDMetricsCollector(window_size_seconds=60.0, clock=clock)
    clock.now += 1.0
    collector.record_step("prefill-0", 2, 600, 0, 1, busy_s=0.5)
    collector.record_step("prefill-1", 1, 100, 0, 1, busy_s=0.25)
    collector.record_step("decode-0", 0, 0, 8, 8, busy_s=0.125)
    collector.record_step("decode-0", 0, 0, 4, 3, busy_s=0.125)
    collector.record_token_gap(0.010, 7)
    collector.record_token_gap(0.030, 3)
    clock.now += 1.0
    with pytest.raises(TypeError, match="SystemMetrics, got NoneType"):
        collector.record_system_metrics(None)  # type: ignore[arg-type]
    collector.record_system_metrics(SystemMetrics(timestamp=clock.now, prefill_queue_length=3))
    metrics = collector.get_current_window_metrics()
    assert metrics.duration_s == 2.0
    assert (metrics.prefill.num_steps, metrics.prefill.num_tokens, metrics.prefill.batch_size) == (2, 700, 1.5)
    assert (metrics.prefill.utilization, metrics.decode.utilization) == (0.25, 0.125)
    assert (metrics.decode.num_steps, metrics.decode.num_tokens, metrics.decode.batch_size) == (2, 12, 6.0)
    assert (metrics.prefill_throughput, metrics.decode_throughput) == (350, 6.5)
    assert (metrics.itl.count, metrics.itl.percentile(70), metrics.itl.percentile(71)) == (10, 10, 30)
    assert metrics.itl.mean == pytest.approx(16)
    assert metrics.system is not None
    assert metrics.system.prefill_queue_length == 3


def test_latencies_that_overlap_an_exclusion_are_left_out_and_counts_are_not(clock: Clock) -> None:
    collector = SemiPDMetricsCollector(clock=clock)
    serve(collector, clock, "before", prefill_s=1.0)
    collector.record_request_arrival("across", 10)
    clock.now += 1
    collector.begin_exclusion()
    serve(collector, clock, "within", prefill_s=0.5)
    collector.record_token_gap(0.1)
    collector.end_exclusion()
    clock.now += 1
    collector.record_first_token("across")
    collector.record_request_completion("across", output_length=1)
    serve(collector, clock, "after", prefill_s=0.25)
    metrics = collector.get_current_window_metrics()
    assert metrics.ttft.values == (250, 1000)
    assert (metrics.num_completed, metrics.itl.count) == (4, 0)
    collector.reset_window()
    clock.now += 2
    metrics = collector.get_current_window_metrics()
    assert (metrics.duration_s, metrics.num_completed, metrics.ttft.count) == (2, 0, 0)


def test_the_aggregator_adds_up_sources(clock: Clock) -> None:
    aggregator = MetricsAggregator()
    assert aggregator.get_aggregated_metrics().ttft_p95 == 0
    prefill, decode = SemiPDMetricsCollector(clock=clock), SemiPDMetricsCollector(clock=clock)
    start = clock.now
    serve(prefill, clock, "a", prefill_s=0.1)
    prefill.record_step("prefill-0", 1, 10, 0, 1, 0.05)
    clock.now = start
    serve(decode, clock, "b", prefill_s=0.3, tokens=2, decode_s=0.2)
    decode.record_step("decode-0", 0, 0, 1, 1, 0.1)
    for _ in range(2):  # the latest window of each source counts, once
        aggregator.update_prefill_metrics(prefill.get_current_window_metrics())
        aggregator.update_decode_metrics(decode.get_current_window_metrics())
    metrics = aggregator.get_aggregated_metrics()
    assert metrics.ttft.values == pytest.approx((100, 300))
    assert (metrics.num_completed, metrics.output_tokens) == (2, 2)
    assert (metrics.prefill.num_tokens, metrics.decode.num_tokens) == (10, 1)
    assert metrics.decode.utilization == pytest.approx(0.2)
    aggregator.remove("decode")
    assert aggregator.get_aggregated_metrics().num_completed == 1


def test_any_scheduler_can_be_given_the_hooks(clock: Clock) -> None:
    scheduler = SimpleNamespace()
    collector = SemiPDMetricsCollector(clock=clock)
    assert integrate_semi_pd_metrics_with_scheduler(scheduler, InstanceRole.PREFILL, collector) is collector
    request = SimpleNamespace(request_id="a", prompt_token_ids=[1, 2, 3])
    batch = SimpleNamespace(reqs=[request])
    scheduler.semi_pd_on_request_arrival(request)
    clock.now += 1
    scheduler.semi_pd_on_batch_prefill_start(batch)
    clock.now += 1
    scheduler.semi_pd_on_first_token_generated(request)
    scheduler.semi_pd_on_batch_prefill_end(batch)
    scheduler.semi_pd_on_batch_decode_start(batch)
    clock.now += 1
    scheduler.semi_pd_on_request_completion(request, output_length=2)
    [measured] = scheduler.semi_pd_metrics.history
    assert (measured.input_length, measured.ttft_ms, measured.tpot_ms) == (3, 2000, 1000)
    with pytest.raises(TypeError, match="semi_pd_on_request_arrival"):
        integrate_semi_pd_metrics_with_scheduler(scheduler, InstanceRole.PREFILL)


def test_a_shorter_window_takes_nothing_from_the_long_one() -> None:
    time = 0.0
    collector = SemiPDMetricsCollector(window_size_seconds=60.0, clock=lambda: time)
    for second in range(40):
        time = second + 0.5
        collector.record_request_arrival(str(second), input_length=second)
    time = 40.0
    short = collector.get_current_window_metrics(10.0)
    assert (short.window_start_time, short.num_arrivals) == (30.0, 10)
    assert short.input_length.values == tuple(range(30, 40))
    assert collector.get_current_window_metrics().num_arrivals == 40


@given(st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 9)), max_size=60), st.integers(1, 20))
def test_a_thinned_distribution_keeps_count_and_mean(samples: list[tuple[float, int]], max_values: int) -> None:
    whole = Distribution.of(samples)
    thin = whole.thinned(max_values)
    assert len(thin.values) <= max_values
    assert thin.count == whole.count
    assert thin.mean == pytest.approx(whole.mean)
    assert list(thin.values) == sorted(thin.values)
