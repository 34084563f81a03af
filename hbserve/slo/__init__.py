"""Prediction of latencies and choice of a split: pure functions and plain data, without clock, thread or process."""
