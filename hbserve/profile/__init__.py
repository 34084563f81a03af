"""How long a model's steps take on a device, at any share of it: ``python -m hbserve.profile --help``."""
