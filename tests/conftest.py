"""Fixtures that several modules use; a module that needs another one has its own of the same name."""

from tests.http_server import api, client, http, max_model_len, scheduler, tokenizer, url  # noqa: F401
