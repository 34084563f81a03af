"""The scheduler's side of KV tiers: what is stored where, and the copies under way."""
