"""Fixtures that several modules use; a module that needs another one has its own of the same name."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in our child processes; before anything imports torch

from tests.http_server import api, client, http, max_model_len, scheduler, tokenizer, url  # noqa: F401
