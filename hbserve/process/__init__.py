"""Child processes: their start, their supervision and their end."""
