"""The place of a model's weights, how they are loaded, and the forward pass."""
