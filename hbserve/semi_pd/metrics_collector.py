"""Public path of the metrics collector, which lives in `hbserve.metrics`."""

from hbserve.metrics.collector import SemiPDMetricsCollector
from hbserve.metrics.request_metrics import RequestMetrics
from hbserve.metrics.window_metrics import AggregatedMetrics, RoleMetrics, SystemMetrics

__all__ = ["AggregatedMetrics", "RequestMetrics", "RoleMetrics", "SemiPDMetricsCollector", "SystemMetrics"]
