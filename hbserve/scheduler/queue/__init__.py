"""Waiting requests: which is next, and which instances it goes to."""
