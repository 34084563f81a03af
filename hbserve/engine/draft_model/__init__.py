"""The draft model of a worker: a small model that guesses tokens, which the served model verifies."""
