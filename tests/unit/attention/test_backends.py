"""What the backends of attention have in common, those that need a GPU included."""

from __future__ import annotations

import inspect

import pytest

from hbserve.attention import _BACKENDS
from hbserve.attention.base import AttentionBackend


@pytest.mark.parametrize("name", _BACKENDS)
def test_every_backend_is_made_alike(name: str) -> None:
    # A worker makes whichever was selected in one place; types do not check the arguments of a class in a variable.
    assert inspect.signature(_BACKENDS[name]) == inspect.signature(AttentionBackend)
