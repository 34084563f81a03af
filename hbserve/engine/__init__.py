"""The engine of a worker: step plans in, sampled tokens out."""
