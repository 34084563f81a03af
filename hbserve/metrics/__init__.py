"""Measurements of requests and workers: plain Python, any clock, bounded memory.

The path of a number: the scheduler tells `SemiPDMetricsCollector` of each event. The collector keeps a sliding window
(for controllers) and histograms since the start (for Prometheus). ``/stats`` and ``/metrics`` read both.
"""
