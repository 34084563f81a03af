"""Front of the scheduler: its client, the text engine, and the processes that tokenize."""
