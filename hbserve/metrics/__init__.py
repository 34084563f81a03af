"""What is measured about requests and workers: plain Python, any clock, bounded memory."""
