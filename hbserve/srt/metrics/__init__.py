"""Signposts to the metrics."""
