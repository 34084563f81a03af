"""Typed messages between processes, over ZeroMQ and pipes."""
