"""Open requests of the scheduler: their phases, and what changes them."""
