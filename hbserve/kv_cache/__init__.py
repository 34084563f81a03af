"""The KV cache: the layout of its bytes (workers), and the allocator of its blocks (scheduler)."""
