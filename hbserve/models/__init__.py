"""Models: what one is, where its weights lie, how they are loaded, and the forward pass."""
