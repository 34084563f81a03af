"""Backends in which the sender writes alone into the memory of the receiver."""
