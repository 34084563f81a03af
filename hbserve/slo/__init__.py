"""Prediction of latencies and the choice of a split. Pure functions and plain data."""
