"""`UnifiedStorageManager` in a program with threads: exact counts, and errors instead of broken tables."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from hbserve.errors import InvalidRequestError, StaleBlockError
from hbserve.metrics.collector import SemiPDMetricsCollector
from hbserve.metrics.window_metrics import AggregatedMetrics, MetricsAggregator
from hbserve.semi_pd.unified_storage_manager import UnifiedStorageManager
from hbserve.semi_pd.utils import InstanceRole

NUM_THREADS = 6
DEADLINE_S = 60.0


@pytest.fixture(autouse=True)
def _frequent_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def run_in_threads(work: Callable[[int], None]) -> None:
    """Run work in several threads at once, and raise what one of them raised."""
    errors: list[BaseException] = []
    all_run = threading.Barrier(NUM_THREADS)

    def run(number: int) -> None:
        try:
            all_run.wait(DEADLINE_S)
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(NUM_THREADS)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + DEADLINE_S
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


@pytest.mark.parametrize("seed", range(3))
def test_threads_that_allocate_share_seal_pin_and_free_leave_exact_counts(seed: int) -> None:
    storage = UnifiedStorageManager(24, 16)
    given: list[str] = []  # requests of all threads, to share from

    def work(number: int) -> None:
        generator = random.Random(1000 * seed + number)
        open_requests: list[str] = []
        for count in range(300):
            request = f"{number}-{count}"
            role = generator.choice([InstanceRole.PREFILL, InstanceRole.DECODE])
            blocks = storage.allocate_blocks(request, generator.randrange(1, 6), role)
            if blocks is not None:
                open_requests.append(request)
                given.append(request)
                handles = storage.get_block_handles(request)
                assert [handle.block_id for handle in handles] == blocks
                storage.check_handles(handles)
                storage.seal_block(request, 0, f"contents {generator.randrange(50)}".encode())
                with suppress(InvalidRequestError):  # the source may be freed meanwhile
                    target = f"{request}-shared"
                    storage.share_blocks(generator.choice(given), target)
                    open_requests.append(target)
            if open_requests and (blocks is None or generator.random() < 0.5):
                ended = open_requests.pop(generator.randrange(len(open_requests)))
                storage.pin(ended)
                storage.deallocate_blocks(ended)
                storage.unpin(ended)
            assert 0 <= storage.num_free_blocks <= storage.total_blocks
        for request in open_requests:
            storage.deallocate_blocks(request)

    run_in_threads(work)
    storage.check_consistency()
    assert storage.num_free_blocks == 24


def test_a_block_never_has_two_requests_that_did_not_share_it() -> None:
    storage = UnifiedStorageManager(12, 16, enable_prefix_caching=False)
    taken: set[int] = set()
    lock = threading.Lock()

    def work(number: int) -> None:
        for count in range(800):
            blocks = storage.allocate_blocks(f"{number}-{count}", 3, InstanceRole.PREFILL)
            if blocks is None:
                continue
            with lock:
                assert taken.isdisjoint(blocks)
                taken.update(blocks)
            with lock:
                taken.difference_update(blocks)
            storage.deallocate_blocks(f"{number}-{count}")

    run_in_threads(work)
    storage.check_consistency()


def test_several_operations_are_one_under_the_lock() -> None:
    storage = UnifiedStorageManager(2 * NUM_THREADS, 16)

    def work(number: int) -> None:
        for _ in range(200):
            with storage.lock:
                before = storage.num_free_blocks
                assert storage.allocate_blocks(f"{number}", 2) is not None
                assert storage.num_free_blocks == before - 2
            storage.deallocate_blocks(f"{number}")

    run_in_threads(work)


def test_threads_that_report_and_read_metrics_lose_no_event() -> None:
    collector = SemiPDMetricsCollector(window_size_seconds=600.0, max_history_size=10_000)
    aggregator = MetricsAggregator()

    def work(number: int) -> None:
        for count in range(200):
            request = f"{number}-{count}"
            collector.record_request_arrival(request, 10)
            collector.record_first_token(request)
            if count % 10 == 0:
                collector.begin_exclusion()
                collector.end_exclusion()
            collector.record_token_gap(0.01)
            collector.record_request_completion(request, 4)
            aggregator.update_decode_metrics(AggregatedMetrics(window_start_time=0, window_end_time=1), request)
            if count % 20 == 0:
                collector.get_real_time_metrics()
                aggregator.get_aggregated_metrics()
            aggregator.remove(request)

    run_in_threads(work)
    window = collector.get_current_window_metrics()
    assert (window.num_arrivals, window.num_completed, window.input_tokens) == (1200, 1200, 12_000)
    assert sum(collector.histograms["inter_token_latency_seconds"].counts) == 1200


def test_blocks_are_shared_before_they_are_sealed_and_freed_with_the_last_request() -> None:
    storage = UnifiedStorageManager(8, 16)
    blocks = storage.allocate_blocks("source", 3, InstanceRole.PREFILL)
    assert storage.share_blocks("source", "target") == blocks
    handles = storage.get_block_handles("target")
    storage.deallocate_blocks("source")
    storage.check_handles(handles)
    storage.seal_block("target", 0, b"contents")
    assert storage.share_blocks("target", "sealed", only_sealed=True) == blocks[:1]
    storage.check_consistency()
    storage.deallocate_blocks("target")
    storage.deallocate_blocks("sealed")
    with pytest.raises(StaleBlockError):
        storage.check_handles(handles)
    storage.check_consistency()
    assert storage.num_free_blocks == 8


def test_what_cannot_be_done_is_refused_and_changes_nothing() -> None:
    storage = UnifiedStorageManager(8, 16)
    storage.allocate_blocks("one", 2)
    storage.allocate_blocks("other", 1)
    storage.allocate_blocks("pinned", 1)
    storage.pin("pinned")
    storage.deallocate_blocks("pinned")
    for refused, why in (
        (lambda: storage.share_blocks("nobody", "new"), "no blocks to share"),
        (lambda: storage.share_blocks("pinned", "new"), "no blocks to share"),
        (lambda: storage.share_blocks("one", "other"), "has blocks already"),
        (lambda: storage.share_blocks("one", "one"), "has blocks already"),
        (lambda: storage.allocate_blocks("pinned", 1), "still pinned"),
        (lambda: storage.allocate_blocks("one", -1), "num_blocks"),
        (lambda: storage.allocate_blocks("one", 1.5), "num_blocks"),  # type: ignore[arg-type]
        (lambda: storage.allocate_blocks("one", True), "num_blocks"),
        (lambda: storage.unpin("one"), "more often"),
        (lambda: storage.pin("nobody"), "no blocks"),
        (lambda: storage.seal_block("one", 2, b""), "none of index 2"),
        (lambda: storage.get_block_handles("nobody"), "no blocks"),
        (lambda: UnifiedStorageManager(0, 16), "total_blocks"),
        (lambda: UnifiedStorageManager(16, -4), "block_size"),
    ):
        with pytest.raises(InvalidRequestError, match=why):
            refused()
    assert storage.allocate_blocks("one", 5) is None
    storage.deallocate_blocks("nobody")
    storage.unpin("pinned")
    storage.check_consistency()
    assert storage.num_free_blocks == 5
