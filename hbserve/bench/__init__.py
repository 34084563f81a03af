"""Benchmarks, as a user of the public API would write them: ``python -m hbserve.bench --help``."""
