"""Layers of the forward pass that are neither a matrix product nor attention."""
