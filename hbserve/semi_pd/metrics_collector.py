"""Where users find the metrics collector; it lives in `hbserve.metrics`, which the scheduler reports to."""

from hbserve.metrics.collector import SemiPDMetricsCollector
from hbserve.metrics.request_metrics import RequestMetrics
from hbserve.metrics.window_metrics import AggregatedMetrics, RoleMetrics, SystemMetrics

__all__ = ["AggregatedMetrics", "RequestMetrics", "RoleMetrics", "SemiPDMetricsCollector", "SystemMetrics"]
