"""Layers of the forward pass except attention: norms, linear layers, the rotary embedding, tensor parallelism."""
