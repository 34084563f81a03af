"""Backends in which both ends take part in a transfer."""
