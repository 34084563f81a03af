"""Prefill and decode workers that share one GPU, its weights and its KV."""
