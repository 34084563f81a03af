"""Metrics for other schedulers than HBServe's, and metrics of several processes together.

`hbserve.scheduler.scheduler.CpuScheduler` needs none of this: it reports to its ``metrics.collector``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from hbserve.config import InstanceRole
from hbserve.metrics.collector import SemiPDMetricsCollector
from hbserve.metrics.window_metrics import MetricsAggregator

__all__ = ["MetricsAggregator", "SemiPDMetricsHooks", "integrate_semi_pd_metrics_with_scheduler"]


class MeasuredRequest(Protocol):
    """Request as the hooks need it; `hbserve.messages.client.AddRequest` is one.

    SGLang's names of the two attributes, ``rid`` and ``origin_input_ids``, do as well.
    """

    @property
    def request_id(self) -> str:
        """Name, unique among the open requests."""

    @property
    def prompt_token_ids(self) -> Sequence[int]:
        """Tokens of its prompt."""


class MeasuredBatch(Protocol):
    """Batch as the hooks need it."""

    @property
    def reqs(self) -> Sequence[MeasuredRequest]:
        """Requests in the batch."""


class SemiPDMetricsHooks:
    """Hooks that a scheduler calls at the points of a request's life.

    Args:
        role: of the scheduler's worker. A decode-only worker first sees a request when its prompt is done; calling
            `semi_pd_on_batch_decode_start` is then the request's arrival too.
    """

    def __init__(self, collector: SemiPDMetricsCollector, role: InstanceRole) -> None:
        self._collector, self._role = collector, role

    def semi_pd_on_request_arrival(self, req: MeasuredRequest) -> None:
        """Note that a request has arrived."""
        self._collector.record_request_arrival(_name(req), len(_prompt(req)))

    def semi_pd_on_batch_prefill_start(self, batch: MeasuredBatch) -> None:
        """Note that a prefill batch begins."""
        for req in batch.reqs:
            self._collector.record_prefill_start(_name(req))

    def semi_pd_on_batch_prefill_end(self, batch: MeasuredBatch) -> None:
        """Note that a prefill batch has ended."""
        for req in batch.reqs:
            self._collector.record_prefill_end(_name(req))

    def semi_pd_on_first_token_generated(self, req: MeasuredRequest) -> None:
        """Note a request's first token."""
        self._collector.record_first_token(_name(req))

    def semi_pd_on_batch_decode_start(self, batch: MeasuredBatch) -> None:
        """Note that a decode batch begins."""
        for req in batch.reqs:
            if self._role is InstanceRole.DECODE and _name(req) not in self._collector.open_requests:
                self.semi_pd_on_request_arrival(req)
            self._collector.record_decode_start(_name(req))

    def semi_pd_on_request_completion(self, req: MeasuredRequest, output_length: int, success: bool = True) -> None:
        """Note that a request has ended."""
        self._collector.record_request_completion(_name(req), output_length, success)


def _name(req: Any) -> str:
    name: str = req.request_id if hasattr(req, "request_id") else req.rid
    return name


def _prompt(req: Any) -> Sequence[int]:
    prompt: Sequence[int] = req.prompt_token_ids if hasattr(req, "prompt_token_ids") else req.origin_input_ids
    return prompt


def integrate_semi_pd_metrics_with_scheduler(
    scheduler: Any, role: InstanceRole, collector: SemiPDMetricsCollector | None = None
) -> SemiPDMetricsCollector:
    """Give a scheduler of any kind the methods of `SemiPDMetricsHooks`, for it to call.

    Args:
        scheduler: gets the methods, and the collector as ``semi_pd_metrics``.
        collector: gets the reports; default: a new one.

    Returns:
        The collector.

    Raises:
        TypeError: if the scheduler has an attribute of one of these names.
    """
    collector = collector or SemiPDMetricsCollector()
    hooks = SemiPDMetricsHooks(collector, role)
    given: dict[str, Any] = {name: getattr(hooks, name) for name in vars(SemiPDMetricsHooks) if name[0] != "_"}
    given["semi_pd_metrics"] = collector
    for name, value in given.items():
        if hasattr(scheduler, name):
            raise TypeError(f"the scheduler has an attribute {name!r} already; are its metrics integrated twice?")
        setattr(scheduler, name, value)
    return collector
