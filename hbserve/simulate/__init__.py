"""Serving on a simulated clock: ``python -m hbserve.simulate --help``."""
