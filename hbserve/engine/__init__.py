"""The engine of a worker, in its main thread: step plans in, sampled tokens out. Only results are read in another."""
