"""Plans: the contents of a worker's next step."""
