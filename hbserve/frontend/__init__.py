"""Text on this side of the scheduler: the client of the scheduler, and the processes that tokenize."""
