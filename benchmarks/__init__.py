"""Experiments behind docs/results. They use the public API and are not installed."""
