"""Backends in which the sender alone writes into the memory of the receiver."""
