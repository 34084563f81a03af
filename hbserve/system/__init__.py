"""A whole system as one object: its processes, and the Python API over them."""
