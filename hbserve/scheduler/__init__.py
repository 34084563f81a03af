"""The CPU scheduler: the owner of every request and of every block table."""
