"""HBServe: LLM serving with prefill and decode as separate workers under one CPU scheduler."""
