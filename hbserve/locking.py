"""A lock around every public operation of a class, for objects that users share between threads."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, Protocol, TypeVar


class Locked(Protocol):
    """Object with one lock for all its operations."""

    lock: threading.RLock


K = TypeVar("K", bound=type[Any])


def synchronized(kind: K) -> K:
    """Let the public methods and properties of a class, inherited ones too, run one at a time for each object.

    The object's ``lock`` is a `threading.RLock` that its ``__init__`` makes first. A caller that needs several
    operations as one holds that lock around them.
    """
    inherited = [vars(base) for base in reversed(kind.__mro__[:-1])]
    for name, member in {name: member for members in inherited for name, member in members.items()}.items():
        if name.startswith("_"):
            continue
        if isinstance(member, property) and member.fget is not None:
            setattr(kind, name, property(_under_lock(member.fget), member.fset, member.fdel))
        elif callable(member) and not isinstance(member, type):
            setattr(kind, name, _under_lock(member))
    return kind


def _under_lock(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(self: Locked, *arguments: Any, **keywords: Any) -> Any:
        with self.lock:
            return function(self, *arguments, **keywords)

    return run
