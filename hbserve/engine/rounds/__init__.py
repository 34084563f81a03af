"""Rounds of a step on the device: the next one is launched before the tokens of the last one are known."""
