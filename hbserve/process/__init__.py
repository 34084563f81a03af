"""Processes of a system: start, supervision and end of children; event loop and log format."""
