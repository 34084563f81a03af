"""Whole systems: launcher of the processes, and the Python API."""
